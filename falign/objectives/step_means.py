"""Means over a whole optimizer step, which some losses read before the first backward pass of the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from falign.divergences.base import numbers
from falign.objectives.batch import CompletionBatch

__all__ = ["StepMean", "StepRows", "Weighted", "step_mean"]

StepRows = Literal["own", "mismatched"]
"""The rows of a step mean: the step's own completions, or each prompt with the completions of another prompt."""


class Weighted(NamedTuple):
    """Values and their weights in a mean, of the same shape.

    Attributes:
        values: Any shape, constants.
        weights: Same shape, not negative.
    """

    values: Float[Tensor, ...]
    weights: Float[Tensor, ...]

    def sums(self) -> Float[Tensor, " 2"]:
        """Return ``Σ values·weights`` and ``Σ weights``, in double precision; they add up over batches."""
        values, weights = self.values.detach().double(), self.weights.detach().double()
        return torch.stack([(values * weights).sum(), weights.sum()])


@runtime_checkable
class StepMean(Protocol):
    """A mean over all completions of an optimizer step, under the policy before the step.

    A loss that is not linear in a mean over completions cannot be computed one micro-batch at a time. The trainer
    therefore scores all rows of the step once without gradient, and gives every micro-batch the same mean, so that
    accumulation and sharding change nothing. It costs a forward pass of these rows.

    Attributes:
        rows: ``"own"`` or ``"mismatched"``; see :data:`StepRows`.
        needs: Fields that it reads, as :attr:`Objective.needs`; a subset of the objective's.
    """

    @property
    def rows(self) -> StepRows: ...

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, batch: CompletionBatch) -> Weighted:
        """Return the values of a micro-batch and their weights.

        Args:
            batch: Completions with :attr:`needs`.
        """
        ...


def step_mean(batch: CompletionBatch, name: str, means: Mapping[str, StepMean]) -> Float[Tensor, " N"]:
    """Return a step mean: as given, or that of this batch if the mean is over the batch's own rows.

    Args:
        batch: Completions, with ``step_means[name]`` or as the whole step.
        name: Name of the mean.
        means: The objective's step means.

    Returns:
        The mean, repeated for each row, shape (N,); a constant.

    Raises:
        ValueError: The mean is over other rows and is not given.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.zeros(2, 1),
        ...     completion_mask=torch.ones(2, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 1]),
        ...     step_means={"rewards": torch.tensor([0.5, 0.5])},
        ... )
        >>> step_mean(batch, "rewards", {})
        tensor([0.5000, 0.5000])
    """
    if name in batch.step_means or means[name].rows != "own":
        return numbers(batch.require(f"step_means.{name}"), name)
    with torch.no_grad():
        total, weight = means[name](batch).sums()
        mean = (total / weight.clamp(min=torch.finfo(weight.dtype).tiny)).to(batch.logprobs.dtype)
        return mean.expand(len(batch.logprobs))
