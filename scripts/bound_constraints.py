"""Print pip constraints that hold the dependencies of pyproject.toml to their lowest versions, for test_bounds.sh.

python scripts/bound_constraints.py
"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def floors() -> dict[str, str]:
    """Return the lowest version of each dependency that pyproject.toml allows."""
    requirements = map(Requirement, tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"])
    return {each.name: _floor(each) for each in requirements}


def _floor(requirement: Requirement) -> str:
    (floor,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
    return floor


if __name__ == "__main__":
    print(*(f"{name}=={floor}" for name, floor in floors().items()), sep="\n")
