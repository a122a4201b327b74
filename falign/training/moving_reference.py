"""When a moving reference moves."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from falign.references import MovingReference, PeriodicReset

__all__ = ["MovesReference"]


class MovesReference(TrainerCallback):
    """Move the reference between two optimiser steps.

    It moves when the next step begins, not when one ends: what is logged, evaluated and saved at a step then belongs
    to the reference that the step was taken against. Right after a reset every log-ratio is zero, and the last step
    of a run would be measured by nothing.
    """

    def __init__(self, reference: MovingReference, policy: nn.Module) -> None:
        self.reference, self.policy = reference, policy

    @override
    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        rule = self.reference.rule
        if state.global_step == 0 or state.global_step % rule.every:
            return
        self.reference.move(self.policy)
        if isinstance(rule, PeriodicReset) and rule.reset_optimizer:
            assert optimizer is not None
            optimizer.state.clear()
