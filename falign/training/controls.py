"""The states of an objective's controllers during a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from falign.choices import nearest
from falign.errors import MemberError, TrainingError
from falign.objectives import BaseObjective
from falign.objectives.controllers import Controller, State
from falign.raised import calling
from falign.training.processes import Means, gathered, rank

__all__ = ["Controls"]


class Controls:
    """Give controllers the means of the metrics that they follow, and the objective their values.

    Args:
        objective: The objective, with its controllers.

    Attributes:
        objective: The objective with numbers in place of its controllers; schedules remain.
        states: The state of each controller, by path.
    """

    def __init__(self, objective: BaseObjective) -> None:
        self._given, self._means = objective, Means()
        self.states: dict[str, State] = {
            path: _state(path, each, each.start_state) for path, each in objective.controllers.items()
        }
        self.objective, self._checked = self._controlled(), False

    def _controlled(self) -> BaseObjective:
        values = {}
        for path, each in self._given.controllers.items():
            with calling(f"{path}: controller", each):
                values[path] = each.value(self.states[path])
        return self._given.controlled(values)

    def check(self, *, step: int) -> None:
        """Refuse a controller whose metric the objective does not report; all processes must call it.

        Args:
            step: Number of the step under way, whose losses are computed and whose weights are not yet changed.

        Raises:
            TrainingError: The first step with a finite loss has no mean that a controller could follow.
        """
        if self._checked or not self.states or not (means := self._means.now()):
            return
        self._checked, observed = True, self._observed(means, f"Step {step}")
        for path, controller in self._given.controllers.items():
            if path not in observed:
                close = None if controller.metric is None else nearest(controller.metric, means)
                followed = "a metric divergence/..." if controller.metric is None else f"metric={controller.metric!r}"
                raise TrainingError(
                    f"Step {step}: objective: {path}: {type(controller).__name__} follows {followed}, which the "
                    f"objective does not report{f'; did you mean {close!r}?' if close else ':'} Give metric, one of "
                    f"{', '.join(sorted(means))}."
                )

    def _observed(self, means: Mapping[str, float], place: str) -> Mapping[str, float]:
        try:
            return self._given.observed(means)
        except ValueError as error:
            raise TrainingError(f"{place}: objective: {error}") from error

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the metrics of a micro-batch, one value per item."""
        if self.states:
            self._means.add(metrics)

    def advance(self, *, step: int) -> None:
        """Give the means since the last call to the controllers; all processes must call it.

        Args:
            step: Number of the next step, for messages.

        Raises:
            TrainingError: A controller does not know which metric to follow, its mean is NaN or infinite, or the
                objective refuses the value that it gives.
        """
        if not self.states:
            return
        place = f"Before step {step}"
        for path, value in self._observed(self._means.take(), place).items():
            controller = self._given.controllers[path]
            self.states[path] = _state(path, controller, partial(controller.after, self.states[path], value))
        try:
            self.objective = self._controlled()
        except MemberError:
            raise
        except ValueError as error:  # of a user's own controller; those of falign have bounds, which are tried before
            raise TrainingError(f"{place}: objective: a controller's value is refused: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        """Return states and sums as plain values; all processes must call it."""
        return {"states": {path: dict(state) for path, state in self.states.items()}, "means": self._gathered()}

    def _gathered(self) -> list[dict[str, list[float]]]:
        return gathered([self._means.state_dict()])

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore states and sums."""
        self.states = dict(state["states"])
        self._means.load_state_dict(state["means"][rank()], device)
        self.objective = self._controlled()


def _state(path: str, controller: Controller, make: Callable[[], State]) -> State:
    """Return a controller's state, which must be what a checkpoint gives back.

    Raises:
        MemberError: The controller raised an exception, or its state is not plain values.
    """
    with calling(f"{path}: controller", controller):
        state: Any = make()
    try:
        kept = json.loads(json.dumps(state))
    except (TypeError, ValueError) as error:
        kept, reason = None, str(error)
    else:
        reason = f"a checkpoint would give back {kept!r}"
    same = kept == state or repr(kept) == repr(state)  # as texts, because NaN differs from itself
    if not isinstance(state, Mapping) or not same:
        raise MemberError(
            f"{path}: controller {type(controller).__name__}: its state is {state!r} ({reason}): return a dict with "
            "names and plain numbers, float(x) of a tensor, from start_state and after."
        )
    return state
