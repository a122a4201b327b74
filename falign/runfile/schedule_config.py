"""Schedules in the section ``objective``: forms that may stand wherever it has a number, or a name.

They are taken out of the section before it is validated. The section is then validated with the values at each knot of
the schedules, so that a value which its field refuses is found before training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import PydanticCustomError

from falign.choices import nearest, shown
from falign.errors import ConfigError
from falign.objectives import Controller, Cosine, Linear, Schedule, Stairs, Steps
from falign.objectives.controllers import CONTROLLERS
from falign.objectives.schedules import steps_to_check
from falign.registry import is_own_name
from falign.runfile.base_config import FieldPath, FrozenModel, GivenSchedule, with_value
from falign.runfile.members import call_with_settings

__all__ = [
    "REFUSED",
    "RampConfig",
    "StairsConfig",
    "in_words",
    "is_schedule",
    "last_of",
    "near_schedule",
    "with_schedules",
]

REFUSED = "schedule"
"""Type of the errors of schedules, whose messages have the place and the value."""

OF_NAMES = frozenset({("terms",)})
"""Fields whose keys are names of the user's choice, and so never make a schedule."""

RAMP, STAIRS = "{from: 5e-3, to: 1e-3, steps: 200}", "{from: 16, to: 256, by: 16, every: 10}"
PHASES, CONTROL = "{0: forward_kl, 500: reverse_kl}", "{controller: target_divergence, target: 2.0, start: 0.1}"


class RampConfig(FrozenModel):
    """A number that goes from one value to another and then stays: ``{from: 5e-3, to: 1e-3, steps: 200}``."""

    start: float = Field(alias="from")
    end: float = Field(alias="to")
    steps: int
    """Optimizer steps from the first value to the last."""
    begin: int = 0
    """The step at which it begins to change."""
    shape: Literal["linear", "cosine"] = "linear"

    def build(self) -> Schedule:
        """Return the schedule."""
        ramp = Linear if self.shape == "linear" else Cosine
        return ramp(self.start, self.end, self.steps, self.begin)


class StairsConfig(FrozenModel):
    """A whole number that changes by the same amount at intervals: ``{from: 16, to: 256, by: 16, every: 10}``."""

    start: int = Field(alias="from")
    end: int = Field(alias="to")
    by: int
    """Difference of one stair to the next."""
    every: int
    """Optimizer steps on each stair."""

    def build(self) -> Schedule:
        """Return the schedule."""
        return Stairs(self.start, self.end, self.by, self.every)


def is_schedule(value: Any) -> bool:
    """Return whether a value of a run file is a schedule: it has ``from`` or ``controller``, or its keys are steps.

    Example:
        >>> is_schedule({"from": 0.1, "to": 0.2, "steps": 5}), is_schedule({0: 0.1, 5: 0.2}), is_schedule({"kind": 1})
        (True, True, False)
    """
    return (
        isinstance(value, Mapping)
        and bool(value)
        and ("from" in value or "controller" in value or all(map(_is_step, value)))
    )


def in_words(value: Any, write: Callable[[Any], str] = str) -> str:
    """Return a value as text, or a schedule as its course.

    Args:
        value: A value of a run file.
        write: Writes a value that is not a schedule.

    Example:
        >>> in_words({"from": 0.5, "to": 0.1, "steps": 5})
        '0.5 → 0.1 in 5 steps'
        >>> in_words({0: "forward_kl", 500: "reverse_kl"})
        'forward_kl, from step 500 reverse_kl'
    """
    if not is_schedule(value):
        return write(value)
    if "controller" in value:
        others = ", ".join(f"{name} {each}" for name, each in value.items() if name != "controller")
        return f"{value['controller']} ({others})"
    if "from" in value:
        time = f"in {value['steps']} steps" if "steps" in value else f"by {value['by']} every {value['every']} steps"
        return f"{write(value['from'])} → {write(value['to'])} {time}"
    (_, first), *later = value.items()
    return ", ".join([write(first), *(f"from step {step} {write(each)}" for step, each in later)])


def last_of(value: Any) -> Any:
    """Return the last value of a field that may have a schedule.

    Example:
        >>> last_of({"from": 0.5, "to": 0.1, "steps": 5}), last_of({0: "forward_kl", 9: "reverse_kl"}), last_of(0.3)
        (0.1, 'reverse_kl', 0.3)
    """
    if not is_schedule(value):
        return value
    if "controller" in value:
        return None  # known only from the log
    return value["to"] if "to" in value else list(value.values())[-1]


def near_schedule(value: Any) -> str:
    """Return the forms of schedules, for a message about a mapping or list in place of a number or a name.

    Args:
        value: The value of the field; of one that cannot be meant as a schedule, nothing is returned.

    Example:
        >>> near_schedule({"start": 0.5, "end": 0.1, "steps": 5})[:66]
        '; write from, to in place of start, end: a schedule is one of {fro'
        >>> near_schedule("0.5")
        ''
    """
    if not isinstance(value, Mapping | list):
        return ""
    fields = {**RampConfig.model_fields, **StairsConfig.model_fields}
    aliases = {name: field.alias for name, field in fields.items() if field.alias is not None and name in value}
    python = f"write {', '.join(aliases.values())} in place of {', '.join(aliases)}: " if aliases else ""
    return f"; {python}a schedule is one of {RAMP}, {STAIRS}, {PHASES} and {CONTROL}"


def with_schedules(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Validate a section that may have schedules in place of numbers and names, and return it with them.

    Args:
        value: The section, as the run file has it.
        validate: Validates a section without schedules.

    Raises:
        PydanticCustomError: A schedule is invalid; the message has its path, the value and the remedy.
        ValidationError: The section refuses a value that a schedule reaches.
    """
    if not isinstance(value, dict):
        return validate(value)
    given = {path: _given(form, path) for path, form in _schedules_in(value)}
    if not given:
        return validate(value)
    if ("kind",) in given:
        raise _refusal("objective.kind: it cannot change during training; begin another run from the trained model")

    def at(step: int) -> dict[str, Any]:
        section: Any = value
        for path, each in given.items():
            section = with_value(section, path, each.plain(step))
        return section

    def validated(section: Any, step: int | None) -> Any:
        try:
            return validate(section)
        except ValidationError as error:
            if (reached := _reached(error, section, given, step)) is not None:
                raise reached from error
            raise

    for path, each in given.items():
        for bound in each.bounds:
            validated(with_value(at(0), path, bound), None)
    knots = sorted({0, *(knot for each in given.values() for knot in each.knots)})
    first, *_ = [validated(at(step), step) for step in steps_to_check(knots)]
    return first.scheduled(given)


def _reached(
    error: ValidationError, section: Any, given: Mapping[FieldPath, GivenSchedule], step: int | None
) -> PydanticCustomError | None:
    """Return the refusal of a value that is not in the file, but that a schedule reaches; None for other mistakes.

    Args:
        error: The error of the section at a step.
        section: The section at the step.
        given: The schedules by their paths.
        step: The step; None for a bound of a controller.
    """
    for detail in error.errors(include_url=False):
        for path, each in given.items():
            value = section
            for key in path:
                value = value[key]
            location = iter(detail["loc"])  # the path, with the kinds of sections between
            if repr(detail["input"]) != repr(value) or not all(key in location for key in path):
                continue
            controls = "controller" in each.form
            when = "at some step" if step is None else "at first" if controls else f"at step {step}"
            named = f"; names change in steps, as in {PHASES}" if detail["type"] == "string_type" else ""
            return _refusal(
                f"{_dotted(path)}={shown(value)}: {detail['msg'].removeprefix('Value error, ')} (its "
                f"{'controller' if controls else 'schedule'} has this value {when}){named}"
            )
    return None


def _dotted(path: FieldPath) -> str:
    return ".".join(["objective", *map(str, path)])


def _schedules_in(value: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        if is_schedule(inner) and (*path, name) not in OF_NAMES:
            yield (*path, name), inner
        else:
            yield from _schedules_in(inner, (*path, name))


def _is_step(key: Any) -> bool:
    return (isinstance(key, int) and not isinstance(key, bool)) or (isinstance(key, str) and key.lstrip("-").isdigit())


def _given(form: Mapping[Any, Any], path: FieldPath) -> GivenSchedule:
    """Return a schedule from its form.

    Raises:
        PydanticCustomError: It is invalid.
    """
    place = _dotted(path)
    if "controller" in form and is_own_name(str(form["controller"])):
        if not isinstance(first := form.get("start"), int | float):
            raise _refusal(
                f"{place}.start={first!r}: a controller of your own needs the value at the first step, start"
            )
        return GivenSchedule(dict(form), lambda field: _controller(form, field), lambda step: first)
    if "controller" in form:
        schedule: Schedule = _or_refused(lambda: _controller(form, place), place, form)
    elif "from" in form:
        model = StairsConfig if form.keys() & {"by", "every"} else RampConfig
        try:
            section = model.model_validate(dict(form))
        except ValidationError as error:
            raise _refusal(_mistake(error, model, place)) from error
        schedule = _or_refused(section.build, place, form)
    else:
        # Keys of JSON are texts, sorted as such; those of YAML are in the order in which they were written.
        items = sorted(form.items(), key=lambda item: int(item[0])) if all(isinstance(k, str) for k in form) else form
        form = {int(step): value for step, value in dict(items).items()}
        schedule = _or_refused(lambda: Steps(form), place, form)
    return GivenSchedule(dict(form), lambda field: schedule, schedule, schedule.knots, schedule.bounds)


def _controller(form: Mapping[str, Any], place: str) -> Controller:
    """Return a controller from its form."""
    name = str(form["controller"])
    member = CONTROLLERS.get(name, field=f"{place}.controller")
    settings = {key: value for key, value in form.items() if key != "controller"}
    made = call_with_settings(member, settings, name=name, place=place, key="controller")
    if not isinstance(made, Controller):
        raise ConfigError(
            f"{place}.controller={name!r} makes a {type(made).__name__}: it must be a subclass of falign's Controller "
            "that defines start_state, value and after."
        )
    return made


def _or_refused(build: Callable[[], Any], place: str, form: Any) -> Any:
    try:
        return build()
    except ConfigError as error:  # it has its place
        raise _refusal(str(error).rstrip(".")) from error
    except ValueError as error:
        raise _refusal(f"{place}={shown(dict(form))}: {str(error).rstrip('.')}") from error


def _mistake(error: ValidationError, model: type[BaseModel], place: str) -> str:
    details = error.errors(include_url=False)  # an unknown key first, because it may be why another is missing
    detail = next((each for each in details if each["type"] == "extra_forbidden"), details[0])
    key = ".".join(map(str, detail["loc"]))
    keys = [field.alias or name for name, field in model.model_fields.items()]
    listed = f"a schedule has {', '.join(keys)}, as in {STAIRS if model is StairsConfig else RAMP}"
    if detail["type"] == "missing":
        return f"{place}.{key} is required; {listed}"
    if detail["type"] == "extra_forbidden":
        close = nearest(key, keys)
        return f"{place}.{key} is unknown{f' (did you mean {close}?)' if close else ''}: {listed}"
    named = f"; names change in steps, as in {PHASES}" if isinstance(detail["input"], str) else ""
    return f"{place}.{key}={shown(detail['input'])}: {detail['msg'].removeprefix('Value error, ')}{named}"


def _refusal(message: str) -> PydanticCustomError:
    # A template: braces of a value must not be read as its fields.
    return PydanticCustomError(REFUSED, "{message}", {"message": message})
