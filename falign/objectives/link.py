"""The link function of f-DPO: from a completion's probability ratio u to its implicit reward ``β f'(u)``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from falign.divergences import Divergence
from falign.objectives.batch import CompletionBatch

__all__ = ["CompletionRewards", "Link"]


class CompletionRewards(NamedTuple):
    """The output of a link for a batch; every field is (N,).

    Attributes:
        logprobs: ``log π(y|x)``.
        log_ratio: ``log u`` of whole completions.
        rewards: ``β f'(u)``; carries the gradient.
    """

    logprobs: Float[Tensor, " N"]
    log_ratio: Float[Tensor, " N"]
    rewards: Float[Tensor, " N"]


@dataclass(frozen=True)
class Link:
    """``r̂ = β f'(u)`` with ``u = π(y|x)/π_ref(y|x)``, shared by the losses of pairs and of lists.

    A maximizer of ``E[r] - β D_f(π‖π_ref)`` satisfies ``r = β f'(u) + λ(x)``; this requires ``f'(0+) = -inf``, so that
    no completion gets probability 0.

    Attributes:
        divergence: f; it must have a barrier.
        beta: β, positive.
        length_norm: ``"token"`` divides ``log u`` by the completion's length, so that u is a ratio per token.

    Raises:
        ValueError: The divergence has no barrier, β is not positive, or ``length_norm`` is unknown.

    Source:
        Wang et al., f-DPO (arXiv:2309.16240), Theorem 1.
    """

    divergence: Divergence
    beta: float
    length_norm: Literal["none", "token"]

    def __post_init__(self) -> None:
        if not self.divergence.has_barrier:
            slope = self.divergence.f_prime_at_zero
            raise ValueError(
                f"f-DPO has no closed form under {self.divergence.name}: its f'(0+) = {slope:g} is finite, so the "
                "optimum may give completions probability 0 and r = β f'(u) + λ fails there. "
                "Choose a divergence with a barrier (chi2_kl in place of pearson_chi2, jensen_shannon in place of "
                "total_variation or le_cam)."
            )
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta!r} must be positive and finite.")
        if self.length_norm not in ("none", "token"):
            raise ValueError(f"length_norm={self.length_norm!r}: choose 'none' or 'token'.")

    def reward(self, log_ratio: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Return ``β f'(u)`` of log-ratios."""
        return self.beta * self.divergence.f_prime(log_ratio)

    def rewards_of(self, batch: CompletionBatch, *, weighted: bool = False) -> CompletionRewards:
        """Return the rewards of a batch's completions, and the log-ratios that they come from.

        Args:
            batch: Completions with ``reference_logprobs``.
            weighted: Multiply each token's log-ratio by ``token_weights``; a token of weight 0 is not read.

        Returns:
            One value per completion.
        """
        log_ratio = batch.log_ratio
        if weighted:
            weights = batch.require("token_weights").masked_fill(~batch.completion_mask, 0.0)
            log_ratio = weights * log_ratio.masked_fill(weights == 0, 0.0)
        log_ratio = batch.sequence_sum(log_ratio)
        compared = log_ratio / batch.num_tokens if self.length_norm == "token" else log_ratio
        return CompletionRewards(batch.sequence_sum(batch.logprobs), log_ratio, self.reward(compared))
