"""When a moving reference moves."""

from __future__ import annotations

from typing import Any

from torch import nn

from falign.references import MovingReference, PeriodicReset, Reference

__all__ = ["move_when_due"]


def move_when_due(reference: Reference, policy: nn.Module, *, step: int, optimizer: Any) -> None:
    """Move a reference after every so many optimiser steps; one that does not move is left alone.

    Call it when the next step begins, not when one ends, and before anything is sampled or scored for it: what is
    logged, evaluated and saved at a step then belongs to the reference that the step was taken against. Right after a
    reset every log-ratio is zero, and the last step of a run would be measured by nothing.

    Args:
        reference: What the policy is held to.
        policy: As the last step left it.
        step: Optimiser steps taken so far.
        optimizer: Whose moments a reset may forget.
    """
    if not isinstance(reference, MovingReference) or step == 0 or step % reference.rule.every:
        return
    reference.move(policy)
    if isinstance(reference.rule, PeriodicReset) and reference.rule.reset_optimizer:
        optimizer.state.clear()
