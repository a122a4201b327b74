"""Compare the installed libraries with the releases that falign is made for, before any of them is imported."""

from __future__ import annotations

from importlib.metadata import distributions

from packaging.requirements import Requirement

from falign.errors import InstallationError

__all__ = ["require_supported_releases"]

COMPARED = ("transformers", "peft")
"""Libraries whose internals falign relies on: another release fails with a traceback, or computes something else."""


def require_supported_releases() -> None:
    """Refuse a library that is missing or outside the bounds that falign was installed with.

    A source tree that was never installed declares no bounds, and is not checked.

    Raises:
        InstallationError: A library is missing, too old or too new.
    """
    falign = next(iter(distributions(name="falign")), None)
    told, needed = [], []
    for requirement in map(Requirement, (falign and falign.requires) or ()):
        if requirement.name in COMPARED:
            found = next((each.version for each in distributions(name=requirement.name)), None)
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                told.append(f"{requirement.name} {found} is installed" if found else f"{requirement.name} is missing")
                needed.append(f"'{requirement}'")
    if told:
        raise InstallationError(
            f"{' and '.join(told)}; falign needs {' '.join(needed)}. Run: pip install {' '.join(needed)}"
        )
