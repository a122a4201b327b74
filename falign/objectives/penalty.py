"""The penalty of a policy gradient: estimators of ``D_f(π‖π_ref)`` on the policy's own samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from falign.divergences import Divergence
from falign.divergences.estimators import loss_from_policy, loss_from_vocabulary, value_from_policy
from falign.divergences.powers import power
from falign.objectives.base import CompletionBatch
from falign.objectives.groups import groups_of, mean_of_others
from falign.objectives.measures import DivergenceTo, Measure

__all__ = ["Credit", "Level", "Penalty"]

Level = Literal["sequence", "token", "vocabulary"]
Credit = Literal["fixed_prefix", "returns"]


@dataclass(frozen=True)
class Penalty:
    """A divergence penalty on samples of the policy, or of π_old with importance weights; never clipped.

    Attributes:
        divergence: f.
        level: ``"sequence"``: ``D_f`` of whole completions. ``"token"``: ``Σ_t D_f(π(·|s_t)‖π_ref(·|s_t))`` on the
            policy's own prefixes, from the sampled tokens. ``"vocabulary"``: the same, with each summand computed
            over the full vocabulary. Sequence and token level agree only for the reverse KL.
        credit: Below sequence level, ``"fixed_prefix"`` treats the distribution of prefixes as fixed; ``"returns"``
            adds a token's effect on later prefixes.

    Raises:
        ValueError: A choice is unknown, or ``credit="returns"`` at sequence level.

    Source:
        :mod:`falign.divergences.estimators`.

    Example:
        >>> from falign import divergences
        >>> Penalty(divergences.get("jensen_shannon"), "token").needs
        frozenset({'reference_logprobs'})
    """

    divergence: Divergence
    level: Level = "sequence"
    credit: Credit = "fixed_prefix"

    def __post_init__(self) -> None:
        if self.level not in ("sequence", "token", "vocabulary"):
            raise ValueError(f"level={self.level!r}: choose 'sequence', 'token' or 'vocabulary'.")
        if self.credit not in ("fixed_prefix", "returns"):
            raise ValueError(f"credit={self.credit!r}: choose 'fixed_prefix' or 'returns'.")
        if self.level == "sequence" and self.credit == "returns":
            raise ValueError(
                "credit='returns' at level='sequence': a whole completion has no later prefixes; leave credit out, or "
                "set level='token' or 'vocabulary'."
            )

    @property
    def needs(self) -> frozenset[str]:
        """The reference's log-probabilities."""
        return frozenset({"reference_logprobs"})

    @property
    def measures(self) -> dict[str, Measure]:
        """The divergence over the vocabulary at each token, at level ``"vocabulary"``; else empty."""
        return {"divergence": DivergenceTo(self.divergence)} if self.level == "vocabulary" else {}

    def baseline(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return, for each completion, the mean of ``f'(u)`` over the others of its prompt, 0 if there are none.

        Most of ``f'(u)`` is common to all completions of a prompt; subtracting it reduces the variance.

        Args:
            batch: The rollout, with ``reference_logprobs``.

        Returns:
            Shape (N,), without gradient.
        """
        log_ratio = batch.sequence_sum(batch.log_ratio).detach()
        return mean_of_others(self.divergence.f_prime(log_ratio), groups_of(batch.prompt_index))

    def loss(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return a surrogate whose gradient is ``∇D_f`` in expectation; its value means nothing.

        Args:
            batch: Completions with :attr:`needs` and :attr:`measures`, ``old_logprobs`` if they were sampled from
                π_old, and optionally ``baseline``.

        Returns:
            One surrogate per completion, shape (N,).
        """
        if self.level == "vocabulary":
            return loss_from_vocabulary(
                batch.require("measures.divergence"),
                batch.logprobs,
                batch.completion_mask,
                credit=self.credit,
                old_logprobs=batch.old_logprobs,
            )
        return loss_from_policy(
            self.divergence,
            batch.logprobs,
            batch.require("reference_logprobs"),
            batch.completion_mask,
            level=self.level,
            credit=self.credit,
            old_logprobs=batch.old_logprobs,
            baseline=batch.baseline,
        )

    @torch.no_grad()
    def value(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return an estimate of the divergence, one value per completion; never negative.

        Args:
            batch: As for :meth:`loss`.

        Returns:
            Shape (N,); its expectation is ``D_f`` of the current policy.
        """
        if self.level == "vocabulary":
            return self.loss(batch)
        # Token t is weighted by π/π_old of its prefix, itself included; a whole completion by that of its last token.
        log_ratio, importance = batch.log_ratio, batch.importance_log_ratio.cumsum(dim=-1)
        if self.level == "sequence":
            log_ratio, importance = log_ratio.sum(dim=-1, keepdim=True), importance[:, -1:]
        # A product of two huge values overflows to infinity, which would make a mean over the batch useless. The bound
        # is small enough that even a sum over all tokens of the batch stays finite.
        largest = torch.finfo(log_ratio.dtype).max / max(log_ratio.numel(), 1)
        return (value_from_policy(self.divergence, log_ratio) * power(importance)).clamp(max=largest).sum(dim=-1)
