"""Controllers: coefficients that follow a measured divergence, with a state that a trainer keeps."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from typing_extensions import override

from falign.numeric_fields import NumericFields
from falign.objectives.schedules import Schedule
from falign.registry import Registry

__all__ = ["CONTROLLERS", "Controller", "RootDivergence", "State", "TargetDivergence"]

State = Mapping[str, float]
"""Everything that a controller remembers, as plain numbers, which a checkpoint holds."""


class Controller(Schedule):
    """A coefficient whose next value depends on a metric of the objective.

    It is constant between two observations: a trainer gives it the mean of the metric over each step, or over all
    updates on a rollout, and takes the next value. A controller is a frozen description; the trainer keeps its state.

    A subclass defines the three abstract methods; its first argument in a run file may be any of its fields.

    Attributes:
        metric: Name of the metric; None for the only one called ``divergence/...``.
    """

    metric: str | None = None

    @abstractmethod
    def start_state(self) -> State:
        """Return the state before the first step."""

    @abstractmethod
    def value(self, state: State) -> float:
        """Return the coefficient in a state.

        Args:
            state: As :meth:`start_state` or :meth:`after` returned it.
        """

    @abstractmethod
    def after(self, state: State, measured: float) -> State:
        """Return the next state.

        Args:
            state: The state while the metric was measured.
            measured: Mean of the metric; finite.
        """

    @property
    def bounds(self) -> tuple[float, ...]:
        """The smallest and largest values, if known; an objective that refuses one is refused before training."""
        return ()

    @property
    @override
    def knots(self) -> tuple[int, ...]:
        return (0,)

    @override
    def __call__(self, step: int) -> float:
        return self.value(self.start_state())

    @property
    @override
    def controller(self) -> Controller:
        return self

    def measured(self, metrics: Mapping[str, float]) -> float | None:
        """Return the value that it follows among the means of an objective's metrics; None if it was not measured.

        Args:
            metrics: Means by name.

        Raises:
            ValueError: It is not clear which metric to follow, or its value is NaN or infinite.
        """
        name = self.metric
        if name is None:
            found = sorted(each for each in metrics if each.startswith("divergence/"))
            if len(found) > 1:
                raise ValueError(
                    f"{type(self).__name__} follows a divergence, and the objective reports {', '.join(found)}: give "
                    "metric, the name of one of them."
                )
            if not found:
                return None
            name = found[0]
        value = metrics.get(name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{type(self).__name__} follows {name}, and its mean is {value}.")
        return value


@dataclass(frozen=True)
class TargetDivergence(NumericFields, Controller):
    """Hold a measured divergence D at a target: ``β ← β (1 + gain · clip((D̄ - target)/target, -0.2, 0.2))``.

    β grows while the divergence is above the target, and shrinks while it is below. D̄ is the running mean
    ``smoothing · D̄ + (1 - smoothing) · D``.

    Attributes:
        target: The divergence to hold, positive, in the unit of the metric (nats for a KL).
        start: The first β, positive.
        gain: Largest relative change of β is 0.2 times this; above 0 and below 5.
        smoothing: Weight of the former D̄, from 0 to below 1.
        low: Smallest β; None for a thousandth of ``start``.
        high: Largest β; None for a thousand times ``start``.
        metric: See :class:`Controller`.

    Raises:
        ValueError: A number is out of range.

    Source:
        Ziegler et al. 2019 (arXiv:1909.08593), Section 2.2: the adaptive coefficient, with gain 0.1 and no smoothing.
        Maity, SAFE (arXiv:2602.04651), smooths the KL by 0.9; its own penalty is a plain number in the loss, without
        a gradient, so that only the idea is theirs.

    Example:
        >>> hold = TargetDivergence(target=2.0, start=0.1)
        >>> round(hold.value(hold.after(hold.start_state(), 2.2)), 6), hold.value(hold.after(hold.start_state(), 2.0))
        (0.101, 0.1)
    """

    target: float
    start: float
    gain: float = 0.1
    smoothing: float = 0.0
    low: float | None = None
    high: float | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        for name, value in {"target": self.target, "start": self.start}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} must be positive and finite.")
        if not 0 < self.gain < 5:
            raise ValueError(f"gain={self.gain!r} must be above 0 and below 5, where one change could make β negative.")
        _check_smoothing(self.smoothing)
        low, high = self.bounds
        if not 0 < low <= self.start <= high < math.inf:
            raise ValueError(
                f"low={low!r}, start={self.start!r}, high={high!r}: they must be positive, finite and in this order."
            )

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        low = self.start / 1000 if self.low is None else self.low
        return low, self.start * 1000 if self.high is None else self.high

    @override
    def start_state(self) -> State:
        return {"value": self.start}

    @override
    def value(self, state: State) -> float:
        return state["value"]

    @override
    def after(self, state: State, measured: float) -> State:
        mean = _smoothed(state, measured, self.smoothing)
        error = min(max((mean - self.target) / self.target, -0.2), 0.2)
        low, high = self.bounds
        return {"value": min(max(state["value"] * (1 + self.gain * error), low), high), "mean": mean}


@dataclass(frozen=True)
class RootDivergence(NumericFields, Controller):
    """``β = strength / (2 √D)``: with it, the penalty ``β D_f`` has the gradient of ``strength · √D_f``.

    D is the measured divergence, at least ``floor``, where the root has no gradient. It is from the step before, so
    the gradient is exact where the policy has stopped to change, and lags behind by one step before.

    Attributes:
        strength: Factor of the root, positive.
        floor: Smallest D, positive.
        smoothing: Weight of the former mean of D, from 0 to below 1; the root of a mean over few samples is biased.
        metric: See :class:`Controller`.

    Raises:
        ValueError: A number is out of range.

    Source:
        Laidlaw et al., Correlated Proxies (arXiv:2403.03185), with the Pearson χ² of π and π_ref:
        ``strength = σ √(1 - ρ²)`` bounds the true reward of a proxy with deviation σ and correlation ρ. The floor is
        that of their code.

    Example:
        >>> root = RootDivergence(0.8)
        >>> root.value(root.after(root.start_state(), 0.25))
        0.8
    """

    strength: float
    floor: float = 1e-4
    smoothing: float = 0.0
    metric: str | None = None

    def __post_init__(self) -> None:
        for name, value in {"strength": self.strength, "floor": self.floor}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} must be positive and finite.")
        _check_smoothing(self.smoothing)

    @override
    def start_state(self) -> State:
        return {}

    @override
    def value(self, state: State) -> float:
        return self.strength / (2 * math.sqrt(max(state.get("mean", self.floor), self.floor)))

    @override
    def after(self, state: State, measured: float) -> State:
        return {"mean": _smoothed(state, measured, self.smoothing)}


def _check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing!r}: the weight of the former mean must be at least 0 and below 1.")


def _smoothed(state: State, measured: float, smoothing: float) -> float:
    return smoothing * state.get("mean", measured) + (1 - smoothing) * measured


CONTROLLERS: Registry[type[Controller]] = Registry(
    "controller",
    {"target_divergence": TargetDivergence, "root_divergence": RootDivergence},
    wanted="class",
)
"""Controllers by their names in run files; an own one is called with its settings and makes a :class:`Controller`."""
