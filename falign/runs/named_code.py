"""Code that a run file names, and the decision whether it may run.

A run file that a user gives is the user's own, so the code that it names is imported. A run folder, with its
``run.yaml``, may come from someone else: code that it names runs only if the user trusts it (``trust_code``).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from falign.errors import ConfigError
from falign.registry import is_own_name, own_names_in
from falign.rewards.identity import source_hashes
from falign.runfile.config import RunConfig
from falign.runfile.reading import load_run_file, parse_run
from falign.runfile.reward_config import RewardConfig
from falign.runs.folder import RunFolder

__all__ = [
    "code_of_rewards",
    "import_from",
    "is_recorded",
    "load_own_run_file",
    "named_code",
    "own_code",
    "read_run",
    "require_trust",
]

HASHED = frozenset({"objective", "reference", "references", "measures", "rollout", "training"})
"""Sections whose members decide the steps of a run."""

MEMBERS = frozenset({"kind", "divergence", "advantage", "measure", "first", "second", "controller"})
"""Fields that name a member of a family, which may be a user's own; so may the items of a list or schedule there."""


def read_run(folder: RunFolder, *, uses: Collection[str], trust_code: bool) -> RunConfig:
    """Return the settings of a run folder, which may come from someone else.

    Args:
        folder: The run folder.
        uses: The sections that will be built; code named in other sections is never imported.
        trust_code: Whether code named in these sections may run.

    Raises:
        ConfigError: A section names code and is not trusted, or the run file is damaged or was edited.
    """
    config = parse_run(folder.read_run_file(), place=str(folder.run_file))
    require_trust(named_code(config, uses), place=folder.run_file, trust_code=trust_code)
    folder.require_unedited(config)
    return config


def load_own_run_file(path: str, overrides: Sequence[str] = (), *, trust_code: bool = False) -> RunConfig:
    """Return the settings of a user's run file; if it names code, modules beside it can be imported afterwards.

    Args:
        path: The run file.
        overrides: As for :func:`falign.runfile.load_run_file`.
        trust_code: Whether code may run if the file is the ``run.yaml`` of a run folder.

    Raises:
        ConfigError: As for ``load_run_file``; or the ``run.yaml`` of a run folder names code that is not trusted.
    """
    config = load_run_file(path, overrides)
    code = named_code(config)
    if is_recorded(Path(path)):
        require_trust(code, place=path, trust_code=trust_code)
    if code:
        import_from(Path.cwd(), Path(path).parent)
    return config


def named_code(config: RunConfig, sections: Collection[str] | None = None) -> dict[str, str]:
    """Return the fields of a run that name code, with their values.

    These are members given as ``module:Name``, settings of such members that name further code, ``trust_remote_code``,
    and an attention implementation that is a repository of kernels.

    Args:
        config: The run.
        sections: The sections to search; all by default.
    """
    plain = config.model_dump(mode="json", include=None if sections is None else set(sections))
    return dict(_code_in(plain))


def code_of_rewards(rewards: Sequence[RewardConfig]) -> dict[str, str]:
    """Return the fields of a list of rewards that name code, with their values."""
    return dict(_code_in({"rewards": [reward.model_dump(mode="json") for reward in rewards]}))


def own_code(config: RunConfig, sections: Collection[str] = HASHED) -> dict[str, dict[str, str]]:
    """Return the hashes of the source files of each member given as ``module:Name``, by that name.

    Args:
        config: The run.
        sections: The sections to search. Rewards have their own hashes (:func:`falign.rewards.reward_identities`).
    """
    known = sections & RunConfig.model_fields.keys()
    names = [name for value in named_code(config, known).values() for name in own_names_in(value)]
    return {name: source_hashes(name.partition(":")[0]) for name in names}


def require_trust(code: dict[str, str], *, place: str | Path, trust_code: bool) -> None:
    """Refuse code that a run folder names, unless it is trusted.

    Raises:
        ConfigError: Code is named and not trusted; the message has the first field.
    """
    if code and not trust_code:
        field, value = next(iter(code.items()))
        raise ConfigError(
            f"{place} names code: {field}={value}. Code that a run folder names does not run by default: read it, "
            "and give trust_code=True if you trust it."
        )


def import_from(*folders: Path) -> None:
    """Put folders first on the import path, so that ``module:Name`` is found in them."""
    sys.path[:0] = [place for place in dict.fromkeys(str(folder.absolute()) for folder in folders)]


def is_recorded(run_file: Path) -> bool:
    """Return whether a run file is the ``run.yaml`` of a run folder rather than one that a user wrote."""
    return run_file.name == "run.yaml" and (run_file.parent / "manifest.json").is_file()


def _code_in(value: Any, prefix: str = "", *, is_own: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the paths of fields that name code.

    In the section of a user's own member and among measures, any value may name code, even inside parentheses.
    """
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    is_own = (
        is_own or prefix.startswith("measures.") or (isinstance(value, dict) and is_own_name(str(value.get("kind"))))
    )
    section = prefix.rstrip(".").rpartition(".")[2]
    for name, inner in items:
        if _is_code(section if str(name).isdigit() else str(name), inner, is_own=is_own):
            yield f"{prefix}{name}", str(inner)
        yield from _code_in(inner, f"{prefix}{name}.", is_own=is_own)


def _is_code(name: str, value: Any, *, is_own: bool) -> bool:
    if name == "trust_remote_code":
        return value is True
    if not isinstance(value, str):
        return False
    if name == "attn_implementation":
        return "/" in value  # a repository, from which transformers fetches compiled kernels
    return name == "function" or (":" in value and name in MEMBERS) or (is_own and own_names_in(value) != [])
