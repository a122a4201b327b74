import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
House = runpy.run_path(str(ROOT / "scripts" / "house.py"))["House"]
FILES = {
    "__init__.py": "",
    "base.py": '"""What everything has."""\nclass FrozenModel: ...\n',
    "references/__init__.py": "from falign.references.kinds import Moving, Off, Reference\n",
    "references/kinds.py": """
from typing import NamedTuple, Protocol

import torch

class Reference(Protocol):
    rank: int | None
    '''What this is.'''

class Off: ...
class Moving(Off): ...
class State(NamedTuple): ...
class OffError(Exception): ...
BOTH = (Off, Moving)
""",
    "one.py": """
from falign import references
from falign.base import FrozenModel
from falign.references import Moving, Off as TurnedOff, Reference
from falign.references.kinds import BOTH, OffError, State
from falign import two

class Section(FrozenModel): ...

def ask(x):
    return [
        isinstance(x, Section),
        isinstance(x, TurnedOff | None),
        isinstance(x, (references.Moving, int)),
        isinstance(x, BOTH),
        type(x) is Moving,
        isinstance(x, Reference), isinstance(x, State), isinstance(x, OffError), isinstance(x, int),
    ]
""",
    "two.py": "try:\n    from falign import three\nexcept ImportError:\n    pass\n",
    "three.py": "from falign.one import ask\n",
    "four.py": """
from typing import TYPE_CHECKING
from .two import __doc__
if TYPE_CHECKING:
    from falign.five import a
""",
    "five.py": "def a():\n    from falign import four\nimport falign.four\n" + "x = 1\n" * 60,
}


@pytest.fixture
def house(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "falign" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return House(tmp_path / "falign")


def test_every_form_of_a_question_for_a_concrete_kind_is_found_and_no_other(house):
    assert [place.split("  ")[1] for place in house.isinstance_on_kinds()] == [
        "Section",
        "Off",
        "Moving",
        "Off | Moving",
        "Moving",
    ]
    assert all(place.startswith("falign/one.py:") for place in house.isinstance_on_kinds())


def test_circles_are_those_of_imports_at_module_level(house):
    assert house.circles() == [["falign.one", "falign.three", "falign.two"]]
    assert house.leads_to(house.modules["falign.four"]) == {"falign.two"}
    assert house.leads_to(house.modules["falign.five"]) == {"falign.four"}


def test_docstrings_and_sizes_are_counted(house):
    assert [place.split("  ")[0] for place in house.docstrings_with_what()] == [
        "falign/base.py:1",
        "falign/references/kinds.py:8",
    ]
    counts = dict(
        line.rsplit(maxsplit=2)[:2] for line in house.report().splitlines()[1:6] if line.split()[-2].isdigit()
    )
    assert counts["files"] == "9"
    assert counts["files under 60 lines"] == "6"


def test_this_package_has_no_circles_and_all_of_it_is_counted():
    table = [" ".join(line.split()) for line in House(ROOT / "falign").report().splitlines()]
    files = len(list((ROOT / "falign").rglob("*.py")))
    assert table[1] == f"files {files} 285"
    assert table[5] == "import circles 0 0"
