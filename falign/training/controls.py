"""The states of an objective's controllers during a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from falign.errors import TrainingError
from falign.objectives import BaseObjective
from falign.objectives.controllers import State
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
        self.states: dict[str, State] = {path: each.start_state() for path, each in objective.controllers.items()}
        self.objective = self._controlled()

    def _controlled(self) -> BaseObjective:
        controllers = self._given.controllers
        return self._given.controlled({path: each.value(self.states[path]) for path, each in controllers.items()})

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the metrics of a micro-batch, one value per item."""
        if self.states:
            self._means.add(metrics)

    def advance(self, *, step: int) -> None:
        """Give the means since the last call to the controllers; all processes must call it.

        Args:
            step: Number of the next step, for messages.

        Raises:
            TrainingError: A controller does not know which metric to follow, or its mean is NaN or infinite.
        """
        if not self.states:
            return
        try:
            observed = self._given.observed(self._means.take())
        except ValueError as error:
            raise TrainingError(f"Before step {step}: objective: {error}") from error
        for path, value in observed.items():
            self.states[path] = self._given.controllers[path].after(self.states[path], value)
        self.objective = self._controlled()

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
