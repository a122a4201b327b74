"""Names that are imported at first use are those that type checkers see, and each can be imported."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import falign

PACKAGE = Path(falign.__file__).parent
LAZY = sorted(
    ".".join(file.parent.relative_to(PACKAGE.parent).parts)
    for file in PACKAGE.rglob("__init__.py")
    if "lazy_names(" in file.read_text()
)


def imported_for_type_checkers(tree):
    """Names under ``if TYPE_CHECKING``."""
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {alias.asname or alias.name for node in block.body for alias in getattr(node, "names", ())}


@pytest.mark.parametrize("name", LAZY)
def test_the_lazy_names_are_those_of_the_type_checker_and_all_can_be_imported(name):
    package = import_module(name)
    tree = ast.parse(Path(package.__file__).read_text())
    lazy = set(vars(package)["__dir__"]())
    assert lazy == imported_for_type_checkers(tree)
    assert lazy <= set(package.__all__)
    for each in package.__all__:
        assert getattr(package, each) is getattr(package, each)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        _ = package.nothing


def test_import_falign_loads_nothing_heavy_and_its_names_load_torch():
    code = (
        "import sys, falign; print('torch' in sys.modules); falign.FDPO, falign.divergences.ReverseKL; "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["False", "True", "False"]
