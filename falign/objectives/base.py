"""The one interface of all objectives: a batch of completions in, unreduced losses with their weights out."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from falign.divergences import Divergence
from falign.divergences.dtypes import numbers
from falign.objectives.batch import CompletionBatch

__all__ = ["CompletionBatch", "Objective", "ObjectiveOutput", "RewardingObjective", "RolloutObjective", "Term"]


class Term(NamedTuple):
    """One mean of an objective: ``scale · Σ losses·weights / Σ weights``, both sums over the global batch.

    Attributes:
        losses: Any shape; carries the gradient.
        weights: Of the same shape, not negative. They must not depend on log-probabilities, values or divergences of
            the policy, not even detached: the trainer sums them over the whole step before its first forward pass,
            and stops where they then differ. What depends on the policy belongs into ``losses``.
        scale: Factor of the mean.
    """

    losses: Float[Tensor, ...]
    weights: Float[Tensor, ...]
    scale: float = 1.0

    def share(self, denominator: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return ``scale · Σ losses·weights / denominator``.

        Args:
            denominator: Sum of the weights over all batches that have a share in the mean.

        Returns:
            A scalar; where nothing has any weight (0/0) it is 0.

        Raises:
            ValueError: Losses and weights have different shapes.
        """
        if self.losses.shape != self.weights.shape:
            raise ValueError(
                f"A term has losses of shape {tuple(self.losses.shape)} and weights of shape "
                f"{tuple(self.weights.shape)}; give one weight for each loss."
            )
        losses, weights = numbers(self.losses, "losses"), numbers(self.weights, "weights")
        tiny = torch.finfo(losses.dtype).tiny
        return self.scale * (losses * weights).sum() / denominator.clamp(min=tiny)


class ObjectiveOutput(NamedTuple):
    """The output of an objective.

    Attributes:
        terms: One for most objectives, two for a hybrid: each has its own denominator.
        metrics: Detached; one value per pair, list or completion, so that a mean over ranks and micro-batches is exact.
    """

    terms: tuple[Term, ...]
    metrics: dict[str, Tensor]

    def mean(self) -> Float[Tensor, ""]:
        """Return the loss of this batch alone, for a loop of one's own: the sum over terms of their weighted means."""
        return torch.stack([term.share(numbers(term.weights, "weights").sum()) for term in self.terms]).sum()


TokenWeighting = Literal["none", "activations", "mapo"]
"""Sources of ``CompletionBatch.token_weights``: none, falign's own weights, or the mask of SparsePO's MaPO."""


@runtime_checkable
class Objective(Protocol):
    """Anything that turns a batch into losses.

    Attributes:
        needs: The optional fields of :class:`CompletionBatch` that it reads; a trainer supplies just these.
        token_divergence: The full-vocabulary divergence that fills ``CompletionBatch.token_divergence``, if any.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def token_divergence(self) -> Divergence | None: ...

    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return the losses of a batch.

        Args:
            batch: Completions with :attr:`needs`. The trainer also calls with zeros for what the policy computes, to
                sum the weights of a step, which must not depend on it; see :class:`Term`.

        Returns:
            As many terms in each call, with weights of the shape of their losses.
        """
        ...


@runtime_checkable
class WeightingObjective(Objective, Protocol):
    """An objective that names the source of ``CompletionBatch.token_weights``.

    Attributes:
        weighting: As :func:`falign.scoring.completion_states` takes it.
    """

    @property
    def weighting(self) -> TokenWeighting: ...


@runtime_checkable
class RewardingObjective(Objective, Protocol):
    """An objective that defines an implicit reward: what its policy was made to prefer, read off its probabilities."""

    def completion_rewards(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return the implicit reward of each completion, of which ``rewards/*`` of the metrics are made.

        Args:
            batch: Completions with all that the objective reads, ``preference`` excepted.

        Returns:
            Shape (N,); known up to a constant per prompt.
        """
        ...


@runtime_checkable
class RolloutObjective(Objective, Protocol):
    """An objective on fresh samples, of which some is computed once from the whole rollout.

    A rollout is then cut into micro-batches of whole prompts and updated on several times. What is in ``needs`` must be
    supplied from outside; what ``prepare`` fills in is not in it.
    """

    def prepare(self, batch: CompletionBatch) -> CompletionBatch:
        """Return the batch with ``advantages`` and ``baseline`` filled in where the objective uses them.

        Args:
            batch: The whole rollout before its first update, so that ``logprobs`` are those of π_old.

        Returns:
            The same completions. A batch that comes to the objective without these fields is prepared by it.
        """
        ...
