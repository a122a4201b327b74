"""A check, before they are imported, that the installed libraries are releases that falign supports."""

from __future__ import annotations

from importlib.metadata import distributions

from packaging.requirements import Requirement

from falign.errors import InstallationError

__all__ = ["require_supported_releases"]

CHECKED = ("transformers", "peft")
"""Libraries whose internals falign uses: another release may fail with a traceback, or compute something else."""


def require_supported_releases() -> None:
    """Refuse a library that is missing or outside the version bounds that falign declares.

    A source tree that was never installed declares no bounds, so nothing is checked.

    Raises:
        InstallationError: A library is missing, too old or too new.
    """
    falign = next(iter(distributions(name="falign")), None)
    problems, needed = [], []
    for requirement in map(Requirement, (falign and falign.requires) or ()):
        if requirement.name in CHECKED:
            found = next((each.version for each in distributions(name=requirement.name)), None)
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                problems.append(
                    f"{requirement.name} {found} is installed" if found else f"{requirement.name} is missing"
                )
                needed.append(f"'{requirement}'")
    if problems:
        raise InstallationError(
            f"{' and '.join(problems)}; falign needs {' '.join(needed)}. Run: pip install {' '.join(needed)}"
        )
