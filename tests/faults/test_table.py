"""The table of faults names every row once, and tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).parent / "README.md"
LAST = {"A": 9, "B": 10, "C": 25, "D": 16, "E": 7, "F": 8, "G": 4, "H": 6}
"""Number of rows in each section."""

FAULTS = [f"{section}{number}" for section, last in LAST.items() for number in range(1, last + 1)]


def rows():
    lines = TABLE.read_text(encoding="utf-8").split("\n")
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| [A-H]\d+ \|", line)
    ]
    return {name: (tests, red, commits) for name, _, tests, red, commits in cells}


@cache
def functions(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_fault_has_a_row():
    assert sorted(rows()) == sorted(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_names_tests_that_exist_and_commits(fault):
    tests, red, commits = rows()[fault]
    assert red in {"yes", "new"}
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert named
    missing = [f"{path}::{name}" for path, name in named if name not in functions(path)]
    assert not missing
    assert re.search(r"`[0-9a-f]{7,40}`", commits), "no commit is named"
