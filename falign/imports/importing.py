"""Run files from configurations of other libraries."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falign.choices import shown
from falign.errors import ConfigError, FalignError, refuse_passwords
from falign.foreign.libraries import LIBRARIES
from falign.foreign.translation import Translation
from falign.imports.command_lines import command_and_settings, settings_of_file, words_of_script
from falign.imports.writing import commented
from falign.runfile import parse_run
from falign.runfile.config import RunConfig

__all__ = ["LIBRARIES", "ImportedRun", "import_run"]


@dataclass(frozen=True)
class ImportedRun:
    """A run file that was written from a configuration of another library.

    Attributes:
        text: The run file, with comments.
        config: Its settings.
        command: The command that trains it.
        differences: Where the run differs although all settings are translated.
        unused: Settings that change no result and were left out, each with the reason.
    """

    text: str
    config: RunConfig
    command: str
    differences: tuple[str, ...]
    unused: Mapping[str, str]


def import_run(
    library: str,
    source: str | Path | Sequence[str] | Mapping[str, Any],
    *,
    method: str | None = None,
    processes: int | None = None,
    out: str | Path = "run.yaml",
) -> ImportedRun:
    """Return the run file of a configuration of another library; nothing is written.

    Args:
        library: ``trl``, ``llamafactory`` or ``axolotl``.
        source: A YAML or JSON file; for TRL also the words of a command line, or a shell script with one; or the
            settings by name.
        method: For TRL: the command, if the source does not name it.
        processes: Number of processes of their run, from which sizes of online rollouts follow.
        out: The path of the run file, for the command in its first line.

    Raises:
        ConfigError: Settings are unknown, invalid or have no counterpart; the message has them all.

    Example:
        >>> given = {"model_name_or_path": "m", "dataset_name": "pairs.jsonl", "beta": 0.2}
        >>> run = import_run("trl", given, method="dpo")
        >>> run.config.objective.beta, run.config.training.learning_rate
        (0.2, 1e-06)
    """
    name = LIBRARIES.name_of(library)
    command, given, folder, origin = _settings(name, source)
    place = f"{name}: {origin}"
    refuse_passwords(_without_empty(given), place=place)
    run = LIBRARIES.get(name)(given, command=method or command, folder=folder, processes=processes)
    config = _valid(run, place)
    _leave_out_defaults(run, config)
    line = f"falign train {shlex.quote(str(out))}{run.launch.options}"
    text = commented(run, source=f"{run.command} ({origin})", command=line)
    return ImportedRun(text, config, line, tuple(run.differences), dict(run.unused))


def _settings(library: str, source: Any) -> tuple[str | None, dict[str, Any], Path, str]:
    """Return the command, the settings, their folder, and what messages call the source."""
    if isinstance(source, Mapping):
        return None, dict(source), Path(), "settings in memory"
    words = [str(source)] if isinstance(source, str | Path) else [*source]
    if len(words) == 1 and Path(words[0]).suffix in (".yaml", ".yml", ".json"):
        return None, settings_of_file(words[0]), Path(words[0]).parent, words[0]
    if library != "trl":
        raise ConfigError(f"{shown(' '.join(words))} is not a YAML file of {library}.")
    origin = "a command line"
    if len(words) == 1 and Path(words[0]).is_file():
        words, origin = words_of_script(words[0]), words[0]
    command, given, folder = command_and_settings(words)
    return command, given, folder, origin


def _without_empty(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value not in (None, "", False, True)}


def _valid(run: Translation, place: str) -> RunConfig:
    """Return the settings of the run, checked as ``falign train`` does, except for what depends on the machine."""
    try:
        config = parse_run(run.values, place="the run file")
        model = config.model.model_copy(update={"attn_implementation": "sdpa"})
        config.model_copy(update={"model": model}).check()
    except FalignError as error:
        raise ConfigError(f"{place} is translated to a run that falign refuses: {error}") from error
    return config


def _leave_out_defaults(run: Translation, config: RunConfig) -> None:
    """Leave out values that neither side's user wrote and that are falign's defaults, too."""
    for path in run.by_default - {"training.learning_rate"}:  # whose default follows from the adapter
        section, _, name = path.partition(".")
        part: Any = getattr(config, section)
        fields = type(part).model_fields if name and part is not None else {}
        if name in fields and fields[name].default == run.values[section][name]:
            del run.values[section][name]
            if not run.values[section]:
                del run.values[section]
