"""Micro-batches that do not count: what a process computes while the others have one batch more.

Where gradients or weights are exchanged between processes, each pass of the model is a joint work, and a process
without rows would leave the others waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from falign.objectives import CompletionBatch

__all__ = ["STANDS_IN", "counts", "stand_in", "stand_in_loss"]

STANDS_IN = "stands_in"


def stand_in(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a micro-batch of the same rows that does not count."""
    return {**inputs, STANDS_IN: True}


def counts(inputs: Mapping[str, Any]) -> bool:
    """Return whether a micro-batch counts, in losses, weights and metrics."""
    return STANDS_IN not in inputs


def stand_in_loss(batch: CompletionBatch) -> Tensor:
    """Return 0, with a graph that gives every trained parameter a gradient of 0."""
    loss = 0.0 * batch.logprobs.sum()
    return loss if batch.values is None else loss + 0.0 * batch.values.sum()
