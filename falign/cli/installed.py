"""The installed libraries: their versions, and a check, before they are imported, that falign supports them."""

from __future__ import annotations

from importlib.metadata import distributions

from packaging.requirements import Requirement

from falign.errors import InstallationError

__all__ = ["require_supported_releases", "shown_versions"]

CHECKED = ("transformers", "peft")
"""Libraries whose internals falign uses: another release may fail with a traceback, or compute something else."""

SHOWN = ("torch", "transformers", "peft", "trl")


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


def shown_versions() -> str:
    """Return a line with the version of falign, and those of the libraries that decide what a run computes."""
    import falign

    found = {name: next((each.version for each in distributions(name=name)), "missing") for name in SHOWN}
    return f"falign {falign.__version__} ({', '.join(f'{name} {version}' for name, version in found.items())})"
