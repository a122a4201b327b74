"""Reduction of an objective's terms by weights summed over the whole optimization step.

``Σ losses·weights`` of each micro-batch and rank is divided by one number, the sum of the weights over all
micro-batches and ranks of the step, so that accumulation, sharding and a ragged last batch change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from falign.divergences.dtypes import numbers
from falign.objectives.base import Term

__all__ = ["reduce_terms", "total_weights"]


def total_weights(terms: Sequence[Term]) -> Float[Tensor, " K"]:
    """Return ``Σ weights`` of each term; summed over micro-batches and ranks, they are the step's denominators.

    Args:
        terms: The K terms of one micro-batch.

    Returns:
        Shape (K,), detached.

    Example:
        >>> total_weights([Term(torch.zeros(3), torch.ones(3))])
        tensor([3.])
    """
    return torch.stack([numbers(term.weights, "weights").detach().sum() for term in terms])


def reduce_terms(terms: Sequence[Term], denominators: Float[Tensor, " K"]) -> Float[Tensor, ""]:
    """Return ``Σ_k scale_k Σ losses_k·weights_k / denominator_k``: this micro-batch's share of the step's loss.

    Args:
        terms: The K terms of one micro-batch.
        denominators: Sum of each term's weights over the whole step, shape (K,).

    Returns:
        A scalar; summed over micro-batches and ranks it is the loss of the global batch.

    Raises:
        ValueError: The numbers of denominators and terms differ.

    Example:
        >>> reduce_terms([Term(torch.tensor([1.0, 3.0]), torch.ones(2))], torch.tensor([4.0]))
        tensor(1.)
    """
    if denominators.shape != (len(terms),):
        raise ValueError(f"denominators has shape {tuple(denominators.shape)} for {len(terms)} terms.")
    return torch.stack([term.share(total) for term, total in zip(terms, denominators, strict=True)]).sum()
