"""The one interface of all objectives: a batch of completions in, unreduced losses with their weights out."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from falign.divergences import Divergence

__all__ = ["CompletionBatch", "Objective", "ObjectiveOutput", "RewardingObjective", "Term"]

PER_TOKEN = frozenset(
    {"logprobs", "completion_mask", "reference_logprobs", "old_logprobs", "token_divergence", "token_weights"}
)


@dataclass(frozen=True)
class CompletionBatch:
    """N completions of at most T tokens; logs in nats. Pairs, lists, samples and rollouts are all this.

    Attributes:
        logprobs: ``log π(y_t | x, y_<t)``, shape (N, T); carries the gradient.
        completion_mask: True on completion tokens (the stop token included), shape (N, T).
        prompt_index: Which prompt, shape (N,); equal values form a group.
        reference_logprobs: ``log π_ref`` of the same tokens, shape (N, T).
        old_logprobs: ``log π_old`` before the first update on this rollout, shape (N, T).
        token_divergence: Full-vocabulary ``D_f`` at each position, shape (N, T); carries the gradient.
        preference: Larger is preferred within a prompt, shape (N,) (a pair: 1 and 0; an unpaired label: 1 or 0).
        rewards: External scores, shape (N,).
        from_reference: True where the completion was sampled from the reference, shape (N,).
        token_weights: How much each token counts, ``≥ 0``, shape (N, T); taken as a constant.

    Raises:
        ValueError: Two shapes disagree. (A broadcast would be silent and wrong.)

    Source:
        docs/own-loop.md.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
        ...     completion_mask=torch.tensor([[True, True], [True, False]]),
        ...     prompt_index=torch.tensor([0, 0]),
        ... )
        >>> batch.sequence_sum(batch.logprobs)
        tensor([-3., -3.])
    """

    logprobs: Float[Tensor, "N T"]
    completion_mask: Bool[Tensor, "N T"]
    prompt_index: Int[Tensor, " N"]
    reference_logprobs: Float[Tensor, "N T"] | None = None
    old_logprobs: Float[Tensor, "N T"] | None = None
    token_divergence: Float[Tensor, "N T"] | None = None
    preference: Float[Tensor, " N"] | None = None
    rewards: Float[Tensor, " N"] | None = None
    from_reference: Bool[Tensor, " N"] | None = None
    token_weights: Float[Tensor, "N T"] | None = None

    def __post_init__(self) -> None:
        if self.logprobs.ndim != 2:
            raise ValueError(f"logprobs has shape {tuple(self.logprobs.shape)}; it must be (completions, tokens).")
        for field in fields(self):
            value = getattr(self, field.name)
            expected = self.logprobs.shape if field.name in PER_TOKEN else self.logprobs.shape[:1]
            if value is not None and value.shape != expected:
                raise ValueError(
                    f"{field.name} has shape {tuple(value.shape)}; logprobs of shape {tuple(self.logprobs.shape)} "
                    f"needs {tuple(expected)}."
                )
        if self.completion_mask.dtype != torch.bool:
            raise ValueError(f"completion_mask has dtype {self.completion_mask.dtype}; pass mask.bool().")

    @property
    def num_tokens(self) -> Int[Tensor, " N"]:
        """Length of each completion in tokens, shape (N,)."""
        return self.completion_mask.sum(dim=-1)

    def sequence_sum(self, per_token: Float[Tensor, "N T"]) -> Float[Tensor, " N"]:
        """Return the sum of a per-token quantity over each completion; what lies outside the mask is never read."""
        return per_token.masked_fill(~self.completion_mask, 0.0).sum(dim=-1)

    def require(self, name: str) -> Tensor:
        """Return an optional field.

        Args:
            name: The field.

        Returns:
            Its tensor.

        Raises:
            ValueError: It is None.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"This objective reads CompletionBatch.{name}, which is None; set it when building the batch."
            )
        return value


class Term(NamedTuple):
    """One mean of an objective: ``scale · Σ losses·weights / Σ weights``, both sums over the global batch."""

    losses: Float[Tensor, ...]
    weights: Float[Tensor, ...]
    scale: float = 1.0


class ObjectiveOutput(NamedTuple):
    """What an objective returns.

    Attributes:
        terms: One for most objectives, two for a hybrid: each has its own denominator.
        metrics: Detached; one value per pair, list or completion, so that a mean over ranks and micro-batches is exact.
    """

    terms: tuple[Term, ...]
    metrics: dict[str, Tensor]

    def mean(self) -> Float[Tensor, ""]:
        """Return the loss of this batch alone, for a loop of one's own: the sum over terms of their weighted means."""
        means = [term.scale * (term.losses * term.weights).sum() / term.weights.sum() for term in self.terms]
        return torch.stack(means).sum()


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

    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput: ...


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
