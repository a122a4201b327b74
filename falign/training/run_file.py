"""Reading a run file with its overrides; every mistake is named with its path and the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from falign.errors import ConfigError
from falign.training.config import RunConfig

__all__ = ["load_run_file", "parse_run", "valid_paths"]

ELSEWHERE = {
    "model_name_or_path": "model.path",
    "dataset_name": "data.train",
    "loss_type": "objective.margin_loss",
    "f_divergence_type": "objective.divergence",
    "f_alpha_divergence_coef": "objective.divergence (as alpha(1 - coefficient): TRL's α is 1 minus the paper's)",
    "label_smoothing": "objective.margin_loss (robust(0.1), exo(0.001))",
    "load_in_4bit": "model.quantization (nf4)",
    "use_peft": "adapter",
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_target_modules": "adapter.target_modules",
    "precompute_ref_log_probs": "reference.cache (a folder)",
    "ref_model": "reference.path",
    "max_prompt_length": "data.max_completion_length (what it leaves of data.max_length is the prompt's)",
}
"""What users of TRL write, and where it is here."""


def load_run_file(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run that a YAML file describes.

    Args:
        path: The run file.
        overrides: ``section.field=value``, later ones win; values are YAML.

    Raises:
        ConfigError: The file is missing or no YAML mapping, or a key or value is wrong.
    """
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.absolute().parent.glob("*.y*ml")], n=1)
        raise ConfigError(f"No run file at {file}.{f' Did you mean {file.with_name(near[0])}?' if near else ''}")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError(f"{place} is not YAML: {getattr(error, 'problem', None) or error}.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds {type(data).__name__}, not the sections of a run file (model, data, ...).")
    for override in overrides:
        _apply(data, override)
    return parse_run(data, place=str(file))


def parse_run(data: dict[str, Any], *, place: str = "run") -> RunConfig:
    """Return a validated run.

    Args:
        data: Nested mappings, as in a run file.
        place: What messages call it.

    Raises:
        ConfigError: With one line per mistake.
    """
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors(include_url=False)]
        raise ConfigError(f"{place}: " + "\n  ".join(lines)) from error


def valid_paths(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield ``section.field`` of every field of the run file."""
    for name, field in model.model_fields.items():
        nested = [t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        yield prefix + name
        for inner in nested:
            yield from valid_paths(inner, f"{prefix}{name}.")


def _types(annotation: Any) -> Iterable[Any]:
    if get_origin(annotation) in (Union, UnionType, list):
        return [inner for argument in get_args(annotation) for inner in _types(argument)]
    return [annotation]


def _explain(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {where!r}{_near(where)}"
    if detail["type"] == "missing":
        return f"{where} is required."
    return f"{where}={detail['input']!r}: {detail['msg']}."


def _near(where: str) -> str:
    key = where.rpartition(".")[2]
    if key in ELSEWHERE:
        return f": here it is {ELSEWHERE[key]}."
    paths = [path for path in valid_paths() if not path.endswith(tuple("0123456789"))]
    plain = ".".join(part for part in where.split(".") if not part.isdigit())
    by_key = {path.rpartition(".")[2]: path for path in reversed(paths)}
    close = difflib.get_close_matches(plain, paths, n=1, cutoff=0.7)
    close += [by_key[match] for match in difflib.get_close_matches(key, by_key, n=1, cutoff=0.6)]
    return f": did you mean {close[0]}?" if close else f"; the keys there are {_siblings(plain, paths)}."


def _siblings(where: str, paths: list[str]) -> str:
    section = where.rpartition(".")[0]
    return ", ".join(path.rpartition(".")[2] for path in paths if path.rpartition(".")[0] == section)


def _apply(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{override!r} is not of the form section.field=value.")
    *sections, key = path.split(".")
    target: Any = data
    for section in sections:
        if isinstance(target, list):
            target = target[_index(target, section, path)]
            if not isinstance(target, dict):
                raise ConfigError(f"{override!r}: item {section} is a value, not a section.")
            continue
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict | list):
            raise ConfigError(f"{override!r}: {section} is a value, not a section.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML.") from error
    if isinstance(target, list):
        target[_index(target, key, path)] = value
    else:
        target[key] = value


def _index(items: list[Any], key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"{path}: {key!r} is not one of the items 0 to {len(items) - 1}.")
    return int(key)
