"""Reading of a run file with its overrides; messages name the path of every mistake and the nearest valid path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

from falign.choices import nearest, shown, similar
from falign.errors import NAMES, ConfigError, refuse_passwords
from falign.foreign.names import FOREIGN_NAMES, KINDS_OF_METHODS, near_foreign_name
from falign.plain_yaml import plain_yaml
from falign.runfile.base_config import FrozenModel, PythonObject
from falign.runfile.config import RunConfig
from falign.runfile.engine_config import EngineConfig
from falign.runfile.members import TEXT
from falign.runfile.reward_config import RewardConfig
from falign.runfile.schedule_config import REFUSED, near_schedule

__all__ = [
    "load_reward_list",
    "load_run_file",
    "parse_engine",
    "parse_rewards",
    "parse_run",
    "read_section",
    "valid_paths",
]

MOST_MISTAKES = 20
"""Mistakes that one message lists."""

NAME = "NAME"  # placeholder for names that a user gives to sections


def load_run_file(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the settings of a run from a YAML file.

    The output_dir of a run folder's own run file is that folder, even if it has been moved.

    Args:
        path: The run file.
        overrides: ``section.field=value``, later ones win; values are YAML.

    Raises:
        ConfigError: The file is missing or not a YAML mapping, or a key or value is wrong.
    """
    data = _read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, not the sections of a run file (model, data, ...).")
    folder = Path(path).absolute().parent
    if Path(path).name == "run.yaml" and (folder / "manifest.json").is_file():
        data["output_dir"] = str(folder)
    for override in overrides:
        _apply(data, override)
    return parse_run(data, place=str(path))


def parse_run(data: dict[str, Any], *, place: str = "run") -> RunConfig:
    """Return the validated settings of a run.

    Args:
        data: Nested mappings, as in a run file.
        place: Name of the source in messages.

    Raises:
        ConfigError: There are mistakes, one per line of the message; or a password, which is not shown.
    """
    refuse_passwords(data, place=place)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{place}: {_message(error)}") from error


def load_reward_list(path: str | Path) -> list[RewardConfig]:
    """Return the section ``rewards`` of a YAML file, which may have other sections or hold the list alone.

    Args:
        path: The file.

    Raises:
        ConfigError: The file is missing or has no such section, or a key or value is wrong.
    """
    data = _read_yaml(path, what="file of rewards")
    section = data.get("rewards") if isinstance(data, dict) else data
    if not isinstance(section, list) or not section:
        raise ConfigError(f"{path} has no list of rewards: write `rewards: [{{kind: ...}}]`, as in a run file.")
    return parse_rewards(section, place=str(path))


def parse_rewards(sections: list[Any], *, place: str) -> list[RewardConfig]:
    """Return the section ``rewards`` of values in memory.

    Args:
        sections: One mapping or section per reward.
        place: Where they come from, for messages.

    Raises:
        ConfigError: A key or value is wrong.
    """
    try:
        return _RewardList.model_validate({"rewards": sections}).rewards
    except ValidationError as error:
        raise ConfigError(f"{place}: {_message(error)}") from error


def parse_engine(section: Any, *, place: str) -> EngineConfig:
    """Return the section ``rollout.engine`` of values in memory.

    Args:
        section: A mapping, or the section itself.
        place: Where it comes from, for messages.

    Raises:
        ConfigError: A key or value is wrong, or it holds a password.
    """
    refuse_passwords(section if isinstance(section, dict) else {}, place=place)
    try:
        return _OfRollout.model_validate({"rollout": {"engine": section}}).rollout.engine
    except ValidationError as error:
        raise ConfigError(f"{place}: {_message(error)}") from error


def read_section(path: str | Path, *, what: str) -> Any:
    """Return the values of a YAML file that holds one section.

    Args:
        path: The file.
        what: What the file is, for messages.

    Raises:
        ConfigError: The file is missing, not YAML, or does not hold a mapping.
    """
    found = _read_yaml(path, what=what)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__}, not the keys of a section.")
    return found


def _message(error: ValidationError) -> str:
    """Return one line per mistake, up to ``MOST_MISTAKES``."""
    details = _of_plain_types(error.errors(include_url=False))
    more = [f"and {len(details) - MOST_MISTAKES} more."] if len(details) > MOST_MISTAKES else []
    return "\n  ".join([*map(_explain, details[:MOST_MISTAKES]), *more])


def _of_plain_types(details: Sequence[Any]) -> list[Any]:
    """Return mistakes with one for each value that is of none of several plain types, such as path or text."""
    joined: list[Any] = []
    for detail in details:
        same = joined and detail["loc"][:-1] == joined[-1]["loc"][:-1] and detail["input"] is joined[-1]["input"]
        if not (same and _place(detail["loc"]).path == _place(joined[-1]["loc"]).path):
            joined.append(detail)
        elif joined[-1]["type"] == "path_type":  # a path is written as a text
            joined[-1] = detail
        else:
            joined[-1] = {
                **joined[-1],
                "msg": f"{joined[-1]['msg']} or {detail['msg'].removeprefix('Input should be ')}",
            }
    return joined


class _RewardList(FrozenModel):
    rewards: list[RewardConfig]


class _EngineOnly(FrozenModel):
    engine: EngineConfig


class _OfRollout(FrozenModel):
    rollout: _EngineOnly


def valid_paths(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield ``section.field`` for every field of the run file, for all kinds of each section."""
    for name, field in model.model_fields.items():
        yield prefix + name
        origins = {get_origin(member) for member in _members(field.annotation).values()}
        inside = "0." if origins & {list, tuple} else f"{NAME}." if dict in origins else ""
        section = f"{prefix}{name}.{inside}"
        paths = (path for inner in _models(field) for path in valid_paths(inner, section))
        yield from dict.fromkeys(paths)


def _read_yaml(path: str | Path, *, what: str = "run file") -> Any:
    file = Path(path)
    if not file.is_file():
        near = nearest(file.name, [p.name for p in file.absolute().parent.glob("*.y*ml")])
        raise ConfigError(f"No {what} at {file}.{f' Did you mean {file.with_name(near)}?' if near else ''}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    return plain_yaml(text, place=str(file))


class _Place(NamedTuple):
    """The place of a mistake: its path as the user wrote it, and the kinds of the section there, if any."""

    path: str
    kind: str | None
    kinds: dict[str, type[BaseModel]]
    or_text: bool = False
    """Whether a text may stand in place of the list or section."""


def _place(location: Sequence[str | int]) -> _Place:
    """Return the place of pydantic's location, in which the chosen member of each union is a separate step."""
    steps, parts = list(location), []
    annotation: Any = RunConfig
    kind, kinds, or_text = None, {}, False
    while True:
        members = _members(annotation)
        if len(members) > 1:
            if sections := {tag: each for tag, each in members.items() if _is_section(each)}:
                kind, kinds = None, sections
            or_text = TEXT in members
            if not steps:
                break
            tag = str(steps.pop(0))
            annotation = members.get(tag)
            kind = tag if tag in kinds else kind
            continue
        (annotation,) = members.values() or (None,)
        if not steps:
            break
        step = steps.pop(0)
        parts.append(str(step))
        if _is_section(annotation):
            kind, kinds = (None, {}) if annotation not in kinds.values() else (kind, kinds)
            field = annotation.model_fields.get(str(step))
            annotation = None if field is None else field.annotation  # None for an unknown key
        else:  # an item of a list or a mapping
            annotation = next((each for each in reversed(get_args(annotation)) if each is not Ellipsis), None)
        or_text = False
    return _Place(".".join(parts), kind, kinds, or_text)


def _members(annotation: Any) -> dict[str, Any]:
    """Return the members of a union by the names that locations have for them, without None; or the annotation."""
    tag = ""
    if get_origin(annotation) is Annotated:
        annotation, *marks = get_args(annotation)
        tag = next((mark.tag for mark in marks if isinstance(mark, Tag)), "")
    if get_origin(annotation) not in (Union, UnionType):
        return {} if annotation in (None, type(None)) else {tag or _label(annotation): annotation}
    return {name: each for member in get_args(annotation) for name, each in _members(member).items()}


def _label(annotation: Any) -> str:
    return str(annotation) if get_args(annotation) else getattr(annotation, "__name__", str(annotation)).lower()


def _is_section(annotation: Any) -> bool:
    return (
        isinstance(annotation, type) and issubclass(annotation, BaseModel) and not issubclass(annotation, PythonObject)
    )


def _models(field: FieldInfo) -> list[Any]:
    """Return the sections of a field that a user can write, without records of Python objects."""
    return [each for each in _types(field.annotation) if _is_section(each)]


def _types(annotation: Any) -> Iterable[Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _types(arguments[0])
    if origin in (Union, UnionType, list, dict, tuple):
        return [inner for argument in arguments for inner in _types(argument)]
    return [annotation]


def _explain(detail: Any) -> str:
    place = _place(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return _unknown(place, detail["input"])
    if detail["type"] in ("missing", REFUSED):
        # The message about a schedule has its path and the value.
        return f"{place.path} is required." if detail["type"] == "missing" else f"{detail['msg']}."
    if detail["type"] == "union_tag_invalid":
        given = detail["input"]["kind"]
        close = nearest(str(given), place.kinds)
        hint = f"did you mean {close}? Choose" if close else "choose"
        if (kind := KINDS_OF_METHODS.get(str(given).lower())) in place.kinds:
            hint = f"for this method set {kind} (docs/methods.md lists all methods). Choose"
        return f"{place.path}.kind={shown(given)} is unknown: {hint} one of {', '.join(place.kinds)}."
    if detail["type"] == "union_tag_not_found":
        return f"{place.path}.kind is required: choose one of {', '.join(place.kinds)}."
    reason = detail["msg"].removeprefix("Value error, ")
    if detail["type"] in ("list_type", "tuple_type"):
        reason = f"Input should be {'a name or a list' if place.or_text else 'a valid list'}"
    if detail["type"] in ("model_type", "model_attributes_type"):
        reason = f"this is a section{_example(place)}"
    return f"{place.path}={shown(detail['input'])}: {reason}{_yaml_advice(detail) or _schedule_advice(detail)}."


def _schedule_advice(detail: Any) -> str:
    """Return the forms of schedules for a value that may be meant as one; empty if it cannot."""
    plain = detail["type"] in ("float_type", "int_type", "string_type", "literal_error")
    return near_schedule(detail["input"]) if plain and detail["loc"][0] == "objective" else ""


def _yaml_advice(detail: Any) -> str:
    """Return advice on writing a value of the wrong type in YAML; empty if there is none."""
    given = detail["input"]
    if detail["type"] == "string_type" and isinstance(given, bool | int | float | date):
        kind = "true or false" if isinstance(given, bool) else "a date" if isinstance(given, date) else "a number"
        words = ", as it does yes, no, on and off" if isinstance(given, bool) else ""
        return f"; YAML reads this as {kind}{words}: put it in quotes"
    if detail["type"] in ("list_type", "tuple_type") and isinstance(given, str | bool | int | float):
        return f"; write [{given}]"
    return ""


def _example(place: _Place) -> str:
    if place.kinds and "." in place.path:  # only sections at the top may be null
        return f", as in `{place.path}: {{kind: ...}}`"
    fields, field = RunConfig.model_fields, None
    for step in place.path.split("."):
        if not step.isdigit():
            field = fields[step]
            fields = _models(field)[0].model_fields
    assert field is not None
    optional = ", or null" if type(None) in _types(field.annotation) else ""
    return f", as in `{place.path}: {{{next(iter(fields))}: ...}}`{optional}"


def _unknown(place: _Place, value: Any) -> str:
    # pydantic reports `model.adapter.r=8` as the unknown key model.adapter, but the user means r.
    inner = place
    while isinstance(value, dict) and len(value) == 1:
        key, value = next(iter(value.items()))
        inner = inner._replace(path=f"{inner.path}.{key}")
    for each in dict.fromkeys((inner.path, place.path)):
        if hint := _near(place._replace(path=each)):
            return f"unknown key {each!r}{hint}"
    there = _siblings(place.path) if place.kind is None else place.kinds[place.kind].model_fields
    return f"unknown key {place.path!r}; the keys there are {', '.join(there)}."


def _siblings(path: str) -> dict[str, str]:
    """Return the keys of the section of a path, and their paths as a user would write them."""
    section = path.rpartition(".")[0]
    plain = ".".join("0" if part.isdigit() else part for part in section.split("."))
    before_name = {path.partition(f".{NAME}.")[0] for path in valid_paths() if f".{NAME}." in path}
    plain = re.sub(rf"^({'|'.join(map(re.escape, before_name))})\.[^.]+", rf"\1.{NAME}", plain)
    keys = [known.rpartition(".")[2] for known in valid_paths() if known.rpartition(".")[0] == plain]
    return {key: f"{section}.{key}".strip(".") for key in keys}


def _near(place: _Place) -> str:
    """Return a hint with the known key nearest to an unknown one; empty if none is near."""
    section, _, last = place.path.rpartition(".")
    if last in FOREIGN_NAMES:
        return f": {FOREIGN_NAMES[last].message()}"
    if place.kind is not None and (owners := _owners(place, place.path)):
        own = ", ".join(place.kinds[place.kind].model_fields)
        return f": {section}.kind={place.kind} has no such field, {owners} has. Its fields are {own}."
    paths = list(valid_paths())
    if named := [path for path in paths if path.rpartition(".")[2] == last]:
        least = min(path.count(".") for path in named)
        shallow = [path for path in named if path.count(".") == least]
        close = similar(place.path, named, cutoff=0.8)
        return f": did you mean {close or ' or '.join(shallow)}?"
    fields = [path for path in reversed(paths) if not any(other.startswith(f"{path}.") for other in paths)]
    anywhere = {path.rpartition(".")[2]: path for path in fields}
    siblings = _siblings(place.path)
    if foreign := near_foreign_name(last, [*siblings, *anywhere]):
        message = FOREIGN_NAMES[foreign].message()
        return f": did you mean {foreign}? {message[0].upper()}{message[1:]}"
    close = [known[key] for known in (siblings, anywhere) if (key := similar(last, known)) is not None]
    if not close:
        return ""
    owners = _owners(place, close[0])
    return f": did you mean {close[0]}{f', which {owners} has' if owners else ''}?"


def _owners(place: _Place, path: str) -> str:
    """Return the other kinds of a section that have a field; empty if the given kind has it."""
    section, _, key = path.rpartition(".")
    owners = [kind for kind, model in place.kinds.items() if key in model.model_fields]
    if section != place.path.rpartition(".")[0] or place.kind in owners:
        return ""
    return " or ".join(f"kind={kind}" for kind in owners)


def _apply(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{override!r} is not of the form section.field=value.")
    override = f"{path}=***" if NAMES.search(path.rpartition(".")[2]) else override  # as messages quote it
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
    value = plain_yaml(text, place=f"{shown(override)}: the value")
    if isinstance(target, list):
        target[_index(target, key, path)] = value
    else:
        target[key] = value


def _index(items: list[Any], key: str, path: str) -> int:
    if not (key.isascii() and key.isdigit()):
        parent, _, rest = path.rpartition(f".{key}")
        raise ConfigError(f"{path}: {parent} is a list; did you mean {parent}.0.{key}{rest}?")
    if len(key) > 9 or int(key) >= len(items):  # Python refuses to read thousands of digits
        raise ConfigError(f"{path}: {key!r} is not one of the items 0 to {len(items) - 1}.")
    return int(key)
