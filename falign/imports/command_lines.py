"""Command lines of ``trl``, of its scripts, and of ``accelerate launch`` before them, as settings."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from falign.choices import shown
from falign.errors import ConfigError
from falign.plain_yaml import plain_yaml

__all__ = ["command_and_settings", "settings_of_file", "words_of_script"]

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_WORDS: Mapping[str, Any] = {"true": True, "false": False, "none": None, "null": None}
_ACCELERATE = {"config_file": "accelerate_config", "num_processes": "num_processes"}
_ALONE = {"multi_gpu", "use_fsdp", "use_deepspeed"}


def settings_of_file(path: str | Path) -> dict[str, Any]:
    """Return the settings of a YAML or JSON file.

    Raises:
        ConfigError: It is missing, or does not hold a mapping.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"No configuration at {file}.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    found = plain_yaml(text, place=str(file))
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"{file} holds {shown(found)}, not settings by name.")
    return found


def words_of_script(path: str | Path) -> list[str]:
    """Return the words of the one command of a shell script.

    Raises:
        ConfigError: It cannot be read as one command.
    """
    text = Path(path).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.search(r"\btrl\b|\.py\b", line) and not line.startswith("#")]
    if len(lines) != 1:
        raise ConfigError(f"{path} has {len(lines)} commands of trl; give a file with one, or type it after `--`.")
    return shlex.split(lines[0], comments=True)


def command_and_settings(words: Sequence[str]) -> tuple[str, dict[str, Any], Path]:
    """Return the command, its settings and the folder of its configuration file.

    Args:
        words: ``trl dpo --config dpo.yaml --beta 0.2``, with or without ``accelerate launch``; options win over the
            file, as in TRL.

    Raises:
        ConfigError: A word is not understood.
    """
    left, launch = [*words], {}
    while left and ("=" in left[0] and not left[0].startswith("-")):
        left.pop(0)  # an environment variable
    accelerated = left[:2] == ["accelerate", "launch"]
    while left and left[0] in ("accelerate", "launch", "python", "python3", "-m", "torchrun", "trl"):
        left.pop(0)
    while accelerated and left and left[0].startswith("-"):
        name, equals, value = left.pop(0).lstrip("-").partition("=")
        if name in _ALONE:
            launch["fsdp" if name == "use_fsdp" else "deepspeed" if name == "use_deepspeed" else name] = True
        elif name not in _ACCELERATE:
            raise ConfigError(f"accelerate launch --{name} is not translated; give its configuration as --config_file.")
        else:
            launch[_ACCELERATE[name]] = _value(value if equals else left.pop(0))
    launch.pop("multi_gpu", None)
    if not left or left[0].startswith("-"):
        raise ConfigError("the command is missing: write it as in `trl dpo --model_name_or_path ...`.")
    command = Path(left.pop(0)).stem
    given, folder = _options(left), Path()
    if (config := given.pop("config", None)) is not None:
        folder = Path(config).parent
        given = {**settings_of_file(config), **given}
    return command, {**launch, **given}, folder


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Return options by name: one word is a value, several are a list, none is true."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif not name:
            raise ConfigError(f"{shown(word)} is not an option; options begin with --.")
        else:
            found[name].append(word)
    settings: dict[str, Any] = {}
    for key, values in found.items():
        if not values and key.startswith("no_"):
            settings[key.removeprefix("no_")] = False
        else:
            settings[key] = True if not values else [_value(each) for each in values]
            if len(values) == 1:
                settings[key] = settings[key][0]
    return settings


def _value(word: str) -> Any:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if _NUMBER.fullmatch(word):
        return int(word) if word.lstrip("+-").isdigit() else float(word)
    if word.startswith(("{", "[")):
        try:
            return json.loads(word)
        except json.JSONDecodeError:
            return word  # the setting refuses it, with its name
    return word
