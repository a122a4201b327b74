"""A reference that is renewed when a held-out metric has stopped improving."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from falign.errors import ConfigError, TrainingError
from falign.references.adapters import AdapterReference
from falign.references.frozen_model import FrozenModel
from falign.references.moving import CopyRule, MovingReference

__all__ = ["ResetOnStall", "StallReset"]

_FILE = "stall.json"


@dataclass(frozen=True)
class ResetOnStall(CopyRule):
    """``π_ref ← π`` when a held-out metric has not improved for several evaluations; the optimizer starts anew.

    After a reset, the value at the reset is the one to improve on.

    Attributes:
        patience: Number of evaluations in a row without improvement after which the reference is reset.
        metric: Name of the held-out metric, as in the log without ``eval_``: ``"reward"``, ``"pass@1"``, ``"loss"``.
        min_improvement: An evaluation improves if it is better than the best one by more than this.
        larger_is_better: False for a loss.
        reset_optimizer: Also clear the optimizer's moments.

    Raises:
        ValueError: A number is out of range.

    Source:
        Liu et al., ProRL (arXiv:2505.24864): hard reset of the reference and of the optimizer's state when the
        validation score stalls. When it has stalled was decided by hand there.
    """

    kind: ClassVar[str] = "reset_on_stall"
    patience: int
    metric: str = "reward"
    min_improvement: float = 0.0
    larger_is_better: bool = True
    reset_optimizer: bool = True

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience={self.patience}: the number of evaluations without improvement is at least 1.")
        if not 0 <= self.min_improvement < math.inf:
            raise ValueError(f"min_improvement={self.min_improvement} must be finite and not negative.")

    @property
    def every(self) -> int:
        """1: it may move before any step, if it is due."""
        return 1


class StallReset(MovingReference):
    """A moving reference under :class:`ResetOnStall`: `observe` gets each held-out evaluation, `move` resets it if due.

    A trainer of rollouts calls `move` only before a new rollout is sampled, so that all updates on a rollout have one
    reference.

    Args:
        held: As for :class:`MovingReference`.
        rule: When to reset.
    """

    rule: ResetOnStall

    def __init__(self, held: AdapterReference | FrozenModel, *, rule: ResetOnStall) -> None:
        super().__init__(held, rule=rule)
        self.every = None
        self._best: float | None = None
        self._stale, self._due = 0, False

    @override
    def check_rollouts(self, *, place: str, updates: int) -> None:
        """Accept any number of updates: it moves only between rollouts."""

    @override
    def observe(self, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self.rule.metric)
        if value is None:
            raise ConfigError(
                f"The reference is reset when {self.rule.metric!r} stalls, and the held-out metrics are "
                f"{', '.join(sorted(metrics))}: name one of them as its metric."
            )
        if not math.isfinite(value):
            raise TrainingError(f"The held-out {self.rule.metric}, on which the reference depends, is {value}.")
        if self._best is None or self._gain(value, self._best) > self.rule.min_improvement:
            self._best, self._stale = value, 0
            return
        self._stale += 1
        if self._stale >= self.rule.patience:
            self._best, self._stale, self._due = value, 0, True

    def _gain(self, value: float, best: float) -> float:
        return value - best if self.rule.larger_is_better else best - value

    @override
    def move(self, policy_model: nn.Module, step: int, optimizer: Any) -> None:
        if self._due:
            self._due = False
            self.follow(policy_model)
            if self.rule.reset_optimizer:
                optimizer.state.clear()

    @override
    def metrics(self) -> dict[str, float]:
        best = {} if self._best is None else {"best": self._best}
        return {**super().metrics(), **best, "stale_evaluations": float(self._stale)}

    @override
    def save(self, folder: Path, policy_model: nn.Module) -> None:
        super().save(folder, policy_model)
        state = {"best": self._best, "stale": self._stale, "due": self._due}
        (folder / _FILE).write_text(json.dumps(state), encoding="utf-8")

    @override
    def load(self, folder: Path, policy_model: nn.Module) -> None:
        super().load(folder, policy_model)
        state = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        self._best, self._stale, self._due = state["best"], state["stale"], state["due"]
