"""Schedules: coefficients of an objective that change over training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from falign.divergences import Divergence, get
from falign.numeric_fields import NumericFields
from falign.objectives.base import (
    BaseObjective,
    CompletionBatch,
    Importance,
    Objective,
    ObjectiveOutput,
    PreferenceKind,
    complete,
)
from falign.objectives.link import Link
from falign.objectives.measures import Measure
from falign.objectives.step_means import StepMean
from falign.raised import calling

if TYPE_CHECKING:
    from falign.objectives.controllers import Controller

__all__ = ["Cosine", "Linear", "Schedule", "Scheduled", "Stairs", "Steps", "steps_to_check"]


class Schedule(ABC):
    """The value of a coefficient at each optimizer step, counted from 0."""

    @property
    @abstractmethod
    def knots(self) -> tuple[int, ...]:
        """The steps where its course changes, in order; 0 is one of them, and after the last one it is constant."""

    @abstractmethod
    def __call__(self, step: int) -> Any:
        """Return the value at a step.

        Args:
            step: Number of optimizer steps taken before; not negative.
        """

    @property
    def bounds(self) -> tuple[Any, ...]:
        """Further values that it may take, besides those at its knots; empty by default."""
        return ()

    @property
    def controller(self) -> Controller | None:
        """Itself if its value depends on what is measured during training; None by default."""
        return None


@dataclass(frozen=True)
class _Ramp(NumericFields, Schedule):
    """Base of schedules that go from one number to another."""

    start: float
    end: float
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"start={self.start!r}, end={self.end!r}: both must be finite numbers.")
        if self.begin < 0:
            raise ValueError(f"begin={self.begin!r}: a schedule begins at step 0 or later.")
        if self.steps < 1:
            raise ValueError(
                f"steps={self.steps!r}: the schedule would end before it begins; give the number of optimizer steps "
                "from the first value to the last, at least 1."
            )

    @property
    @override
    def knots(self) -> tuple[int, ...]:
        return tuple(sorted({0, self.begin, self.begin + self.steps}))

    @override
    def __call__(self, step: int) -> float:
        share = min(max(step - self.begin, 0), self.steps) / self.steps
        # The last value itself, not a rounded sum.
        return self.end if share == 1 else self.start + (self.end - self.start) * self._eased(share)

    @abstractmethod
    def _eased(self, share: float) -> float:
        """Return the share of the way, given the share of the time; 0 at 0."""


@dataclass(frozen=True)
class Linear(_Ramp):
    """``start + (end - start) · s``, with s the share of the steps that are taken; then constant.

    Attributes:
        start: Value until step ``begin``.
        end: Value from step ``begin + steps`` on.
        steps: Number of optimizer steps from the first value to the last.
        begin: The step at which it begins to change.

    Raises:
        ValueError: A value is infinite or NaN, ``steps`` is less than 1, or ``begin`` is negative.

    Example:
        >>> beta = Linear(5e-3, 1e-3, steps=200)
        >>> beta(0), beta(100), beta(1000)
        (0.005, 0.003, 0.001)
    """

    @override
    def _eased(self, share: float) -> float:
        return share


@dataclass(frozen=True)
class Cosine(_Ramp):
    """``start + (end - start) · (1 - cos πs)/2``, with s the share of the steps that are taken; then constant.

    Attributes:
        start: Value until step ``begin``.
        end: Value from step ``begin + steps`` on.
        steps: Number of optimizer steps from the first value to the last.
        begin: The step at which it begins to change.

    Raises:
        ValueError: A value is infinite or NaN, ``steps`` is less than 1, or ``begin`` is negative.

    Example:
        >>> beta = Cosine(1.0, 0.0, steps=3)
        >>> [round(beta(step), 4) for step in range(5)]
        [1.0, 0.75, 0.25, 0.0, 0.0]
    """

    @override
    def _eased(self, share: float) -> float:
        return (1 - math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Steps(Schedule):
    """A constant value in each of several phases; the values may be names, such as those of divergences.

    Attributes:
        values: The value of each phase, by its first step; one phase begins at step 0, and the steps ascend.

    Raises:
        ValueError: No phase begins at step 0, a step is not a whole number, or the steps do not ascend.

    Example:
        >>> divergence = Steps({0: "forward_kl", 500: "reverse_kl"})
        >>> divergence(499), divergence(500)
        ('forward_kl', 'reverse_kl')
    """

    values: Mapping[int, Any]

    def __post_init__(self) -> None:
        steps = list(self.values)
        if any(isinstance(step, bool) or not isinstance(step, int) or step < 0 for step in steps):
            raise ValueError(f"steps {steps}: they must be whole numbers of optimizer steps, 0 or more.")
        if 0 not in steps:
            raise ValueError(f"steps {steps}: none is 0; give the value that holds from the first step on.")
        if steps != sorted(steps):
            raise ValueError(f"steps {steps}: they must ascend; write the phases in the order of training.")

    @property
    @override
    def knots(self) -> tuple[int, ...]:
        return tuple(self.values)

    @override
    def __call__(self, step: int) -> Any:
        return self.values[self.knots[bisect_right(self.knots, step) - 1]]


@dataclass(frozen=True)
class Stairs(NumericFields, Schedule):
    """``start + by · floor(step / every)``, up to ``end``: whole numbers, such as a growing number of tokens.

    Attributes:
        start: Value of the first steps.
        end: Last value.
        by: Difference of one stair to the next, not 0; negative if the values descend.
        every: Optimizer steps on each stair.

    Raises:
        ValueError: ``every`` is less than 1, or ``by`` does not lead from start to end.

    Source:
        Wang et al., TCOD (arXiv:2604.24005): its horizon is ``1 + floor(step / k)``.

    Example:
        >>> horizon = Stairs(16, 64, by=16, every=10)
        >>> [horizon(step) for step in (0, 9, 10, 20, 1000)]
        [16, 16, 32, 48, 64]
    """

    start: int
    end: int
    by: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every!r}: the number of optimizer steps on each stair must be at least 1.")
        if (self.end - self.start) * self.by < 0 or (self.by == 0 and self.end != self.start):
            raise ValueError(f"by={self.by!r} does not lead from {self.start!r} to {self.end!r}.")

    @property
    @override
    def knots(self) -> tuple[int, ...]:
        stairs = -(-(self.end - self.start) // self.by) if self.by else 0
        return tuple(sorted({0, self.every, stairs * self.every} if stairs else {0}))

    @override
    def __call__(self, step: int) -> int:
        value = self.start + self.by * (step // self.every)
        return min(value, self.end) if self.by > 0 else max(value, self.end)


def steps_to_check(knots: Sequence[int]) -> list[int]:
    """Return the steps at which values of schedules are tried before a run: those at the knots and between them.

    Args:
        knots: Steps at which a schedule changes its course, in order.

    Example:
        >>> steps_to_check([0, 10])
        [0, 1, 5, 10]
    """
    # A ramp is a fraction after its first step if it ever is one, which a field of whole numbers refuses.
    between = {step for first, last in pairwise(knots) for step in (first + 1, (first + last) // 2)}
    return sorted({*knots, *between})


@dataclass(frozen=True)
class Scheduled(BaseObjective):
    """An objective whose coefficients change over training; :meth:`at` returns that of one step, with plain numbers.

    A trainer takes its losses from ``at(step)`` and computes only what that step's objective reads; ``needs`` and
    ``measures`` are those of all steps together.

    Attributes:
        objective: Any objective.
        schedules: The schedule or controller of each coefficient, by its path: the field ``"beta"``, or
            ``"rehearsal.divergence"`` of a part. A divergence may be given by its name.
        remake: Returns the objective with other values at these paths; by default the fields there are replaced.

    Raises:
        ValueError: A path names no field, or the objective refuses a value; the message names path, step and value.

    Example:
        >>> from falign.objectives import Pairwise
        >>> annealed = Scheduled(Pairwise(get("jensen_shannon")), {"beta": Linear(0.5, 0.1, steps=100)})
        >>> annealed.at(0).beta, annealed.at(50).beta, annealed.at(100).beta
        (0.5, 0.3, 0.1)
    """

    objective: Objective
    schedules: Mapping[str, Schedule]
    remake: Callable[[Mapping[str, Any]], Objective] | None = None

    def __post_init__(self) -> None:
        if not self.schedules:
            raise ValueError("schedules is empty: give a schedule for one coefficient or more, or the objective alone.")
        _ = self._stages

    @property
    @override
    def knots(self) -> tuple[int, ...]:
        return tuple(sorted({0, *(knot for schedule in self.schedules.values() for knot in schedule.knots)}))

    def values(self, step: int) -> dict[str, Any]:
        """Return the values of all coefficients at a step, by path.

        Args:
            step: Number of optimizer steps taken before.
        """
        found = {}
        for path, schedule in self.schedules.items():
            with calling(f"{path}, step {step}: schedule", schedule):
                found[path] = schedule(step)
        return found

    @override
    def at(self, step: int) -> BaseObjective:
        return self._with(self.values(step), step)

    @property
    @override
    def controllers(self) -> Mapping[str, Controller]:
        own = {path: found for path, each in self.schedules.items() if (found := each.controller) is not None}
        return {**complete(self.objective).controllers, **own}

    @override
    def controlled(self, values: Mapping[str, float]) -> BaseObjective:
        inner = complete(self.objective)
        own = {path: Steps({0: values[path]}) for path in self.schedules if path in values}
        rest = {path: value for path, value in values.items() if path in inner.controllers}
        return replace(self, objective=inner.controlled(rest), schedules={**self.schedules, **own})

    @override
    def observed(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        own = {path: each.controller for path, each in self.schedules.items()}
        found = {path: None if each is None else each.measured(metrics) for path, each in own.items()}
        inner = complete(self.objective).observed(metrics)
        return {**inner, **{path: value for path, value in found.items() if value is not None}}

    @override
    def coefficients(self, step: int) -> Mapping[str, float]:
        inner = complete(self.objective).coefficients(step)
        return {**inner, **{k: float(v) for k, v in self.values(step).items() if isinstance(v, int | float)}}

    def _with(self, values: Mapping[str, Any], step: int) -> BaseObjective:
        for known, made in self._last:  # asked for several times in each step
            if known == values:
                return made.at(step)
        try:
            made = complete(_replaced(self.objective, values) if self.remake is None else self.remake(values))
        except (ValueError, TypeError) as error:
            given = ", ".join(f"{path}={value!r}" for path, value in values.items())
            raise ValueError(f"at step {step} of the schedule, {given}: {error}") from error
        self._last[:] = [(dict(values), made)]
        return made.at(step)

    @cached_property
    def _last(self) -> list[tuple[dict[str, Any], BaseObjective]]:
        return []

    @cached_property
    def _stages(self) -> tuple[BaseObjective, ...]:
        """The objectives at all knots and between them: those that a run meets, up to numbers between two others."""
        extremes = [
            {**self.values(0), path: bound} for path, schedule in self.schedules.items() for bound in schedule.bounds
        ]
        stages = (
            *(self.at(step) for step in steps_to_check(self.knots)),
            *(self._with(values, 0) for values in extremes),
        )
        if len(levels := {stage.correction_level for stage in stages}) > 1:
            raise ValueError(f"the unit of importance weights must not change during training, and it is {levels}.")
        if any("log_partition" in stage.needs for stage in stages):
            for path in (path for path in self.schedules if path.partition(".")[0] == "target"):
                raise ValueError(
                    f"{path} has a schedule, and the target's normalizer is estimated over the whole run, during which "
                    "the target must not change: give it one value."
                )
        return stages

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(stage.needs for stage in self._stages))

    @property
    @override
    def measures(self) -> Mapping[str, Measure]:
        """The measures of all steps. Where two steps have another one under a name, the later has a number, too."""
        found: dict[str, Measure] = {}
        for number, stage in enumerate(self._stages):
            for name, measure in stage.measures.items():
                if measure not in found.values():
                    found[name if name not in found else f"{name} of stage {number}"] = measure
        return found

    @property
    @override
    def reads_row_weights(self) -> bool:
        return all(stage.reads_row_weights for stage in self._stages)

    @property
    @override
    def step_means(self) -> Mapping[str, StepMean]:
        """Those of the first step; a trainer asks the objective of each step for its own."""
        return self._stages[0].step_means

    @property
    @override
    def preference_kinds(self) -> frozenset[PreferenceKind]:
        return frozenset().union(*(stage.preference_kinds for stage in self._stages))

    @override
    def label_remark(self, desirable: int, undesirable: int) -> str | None:
        return self._stages[0].label_remark(desirable, undesirable)

    @property
    @override
    def needs_of_samples(self) -> frozenset[str]:
        return frozenset().union(*(stage.needs_of_samples for stage in self._stages))

    @property
    @override
    def needs_of_stored(self) -> frozenset[str]:
        return frozenset().union(*(stage.needs_of_stored for stage in self._stages))

    @property
    @override
    def summands(self) -> Mapping[str, BaseObjective]:
        return self._stages[0].summands

    @property
    @override
    def reads_logprobs(self) -> bool:
        return any(stage.reads_logprobs for stage in self._stages)

    @property
    @override
    def learns_from_samples(self) -> bool:
        return all(stage.learns_from_samples for stage in self._stages)

    @property
    @override
    def imitates(self) -> bool:
        return any(stage.imitates for stage in self._stages)

    @property
    @override
    def rests_at(self) -> str | None:
        names = {stage.rests_at for stage in self._stages}
        return names.pop() if len(names) == 1 else None

    @property
    @override
    def accepts_unnormalized(self) -> bool:
        return all(stage.accepts_unnormalized for stage in self._stages)

    @property
    @override
    def needs_to_prepare(self) -> frozenset[str]:
        return frozenset().union(*(stage.needs_to_prepare for stage in self._stages))

    @property
    @override
    def correction_level(self) -> Importance | None:
        return self._stages[0].correction_level

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Refuse the call, which does not say at which step.

        Raises:
            TypeError: Always; the message has the remedy.
        """
        raise TypeError(
            "The coefficients of this objective depend on the step: call objective.at(step)(batch), with the number "
            "of optimizer steps taken so far."
        )

    @property
    def _last_stage(self) -> BaseObjective:
        return self.at(self.knots[-1])

    @property
    @override
    def link(self) -> Link | None:
        return self._last_stage.link

    @property
    @override
    def rewarding(self) -> bool:
        return self._last_stage.rewarding

    @override
    def completion_rewards(self, batch: CompletionBatch) -> Any:
        """Return the implicit rewards under the last values: those of the trained model.

        Args:
            batch: As for the objective.

        Raises:
            TypeError: The objective defines no implicit reward.
        """
        return self._last_stage.completion_rewards(batch)


def _replaced(target: Any, values: Mapping[str, Any], place: str = "") -> Any:
    """Return a part of an objective with other values at paths inside of it."""
    inner: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        inner.setdefault(name, {})[rest] = value
    changes = {}
    for name, at in inner.items():
        current = _member(target, name, place)
        if "" not in at:
            changes[name] = _replaced(current, at, f"{place}{name}.")
        elif len(at) == 1:
            changes[name] = _like(current, at[""])
        else:
            raise ValueError(f"{place}{name} has a schedule, and so has {place}{name}.{max(at)} inside of it.")
    if isinstance(target, Mapping):
        return {**target, **changes}
    if is_dataclass(target) and not isinstance(target, type):
        return replace(target, **changes)
    sequence: Any = target
    items = [changes.get(str(number), item) for number, item in enumerate(sequence)]
    named = isinstance(sequence, tuple) and type(sequence) is not tuple
    return type(sequence)(*items) if named else type(sequence)(items)


def _member(target: Any, name: str, place: str) -> Any:
    """Return a field of a dataclass, the value of a key, or the item of a list."""
    members = dict(_members(target))
    if name not in members:
        listed = ", ".join(members) or "none"
        raise ValueError(f"{place}{name} is not a field; those of {type(target).__name__} are: {listed}.")
    return members[name]


def _members(target: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(target, Mapping):
        yield from ((str(key), value) for key, value in target.items())
    elif is_dataclass(target):
        yield from ((field.name, getattr(target, field.name)) for field in fields(target))
    elif isinstance(target, Sequence) and not isinstance(target, str):
        yield from ((str(number), item) for number, item in enumerate(target))


def _like(current: Any, value: Any) -> Any:
    return get(value) if isinstance(current, Divergence) and isinstance(value, str) else value
