"""Pairs of completions in a batch, the chosen one first."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from falign.divergences.dtypes import numbers
from falign.objectives.base import CompletionBatch

__all__ = ["accuracies", "pairs_in", "pairs_of"]

ROUNDING = 1e-6


def pairs_of(
    preference: Shaped[Tensor, " N"], prompt_index: Int[Tensor, " N"]
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Return the indices of the chosen and the rejected completion of every pair, in row-major order.

    Args:
        preference: Larger is preferred, shape (N,).
        prompt_index: Which prompt, shape (N,).

    Returns:
        Two index tensors of shape (P,).

    Raises:
        ValueError: A preference is NaN, which cannot be compared.

    Example:
        >>> pairs_of(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1]))
        (tensor([0, 3]), tensor([1, 2]))
    """
    if (missing := preference.isnan()).any():
        raise ValueError(f"preference[{int(missing.nonzero()[0])}] is NaN; leave that completion out.")
    better = preference[:, None] > preference[None, :]
    chosen, rejected = torch.nonzero(better & (prompt_index[:, None] == prompt_index[None, :]), as_tuple=True)
    return chosen, rejected


def pairs_in(batch: CompletionBatch) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Return the pairs of a batch; see :func:`pairs_of`.

    Args:
        batch: Completions with ``preference``.

    Returns:
        Two index tensors of shape (P,), P at least 1.

    Raises:
        ValueError: ``preference`` is None, or no two completions of one prompt differ in it.
    """
    chosen, rejected = pairs_of(batch.require("preference"), batch.prompt_index)
    if len(chosen) == 0:
        raise ValueError("The batch has no pair: no two completions of one prompt differ in preference.")
    return chosen, rejected


def accuracies(margin: Shaped[Tensor, "*S"], size: Shaped[Tensor, "*S"] | float = 0.0) -> Float[Tensor, "*S"]:
    """Return 1 where the margin is positive, 0 where it is negative, and ½ at a tie.

    Args:
        margin: Reward of the chosen minus that of the rejected side, any shape.
        size: Largest absolute reward of the two sides, which sets the rounding error of the margin; same shape.

    Returns:
        The same shape; a margin within ``1e-6 (1 + size)`` is a tie; NaN stays NaN.

    Example:
        >>> accuracies(torch.tensor([3.0, 0.0, 1e-8, -1.0]))
        tensor([1.0000, 0.5000, 0.5000, 0.0000])
    """
    # If the policy equals the reference, both rewards are 0 up to rounding, because log-probs come from different
    # batches or a cache. Counting the sign of that rounding error would look like a real accuracy.
    margin = numbers(margin, "margin")
    tie = margin.abs() <= ROUNDING * (1 + size)
    result = torch.where(tie, torch.zeros_like(margin), torch.sign(margin)).add(1) / 2
    return result.masked_fill(margin.isnan(), torch.nan)
