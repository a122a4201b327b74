"""The link function of f-DPO: from a completion's probability ratio u to its implicit reward ``β f'(u)``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from falign.divergences import Divergence
from falign.numeric_fields import NumericFields
from falign.objectives.batch import CompletionBatch

__all__ = ["CompletionRewards", "Link"]


class CompletionRewards(NamedTuple):
    """The output of a link for a batch; every field is (N,).

    Attributes:
        logprobs: ``log π(y|x)``.
        log_ratio: ``log u`` of whole completions.
        rewards: r̂; carries the gradient.
    """

    logprobs: Float[Tensor, " N"]
    log_ratio: Float[Tensor, " N"]
    rewards: Float[Tensor, " N"]


@dataclass(frozen=True)
class Link(NumericFields):
    """``r̂ = β (f'(u) + (α - 1) log π)`` with ``u = π(y|x)/π_ref(y|x)``; α = 1 but for H-DPO.

    A maximizer of ``E[r] - β D_f(π‖π_ref) + β (α - 1) H(π)`` satisfies ``r = r̂ + λ(x)``; this requires
    ``f'(0+) = -inf``, so that no completion gets probability 0, and an r̂ that increases with π.

    Attributes:
        divergence: f; it must have a barrier.
        beta: β, positive.
        length_norm: ``"token"`` divides ``log u`` and ``log π`` by the completion's length: ratios per token.
        entropy_weight: α, positive. With α < 1, ``u f''(u) ≥ 1 - α`` is required of f: the reverse KL, ``jeffreys`` and
            ``chi2_kl``.

    Raises:
        ValueError: The divergence has no barrier, β or α is not positive, r̂ would not increase with π, or
            ``length_norm`` is unknown.

    Source:
        Wang et al., f-DPO (arXiv:2309.16240), Theorem 1.
    """

    divergence: Divergence
    beta: float
    length_norm: Literal["none", "token"]
    entropy_weight: float = 1.0

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
        if not 0 < self.entropy_weight < math.inf:
            raise ValueError(f"entropy_weight={self.entropy_weight!r} must be positive and finite.")
        if self.entropy_weight < 1:
            self._check_increasing()
        if self.length_norm not in ("none", "token"):
            raise ValueError(f"length_norm={self.length_norm!r}: choose 'none' or 'token'.")

    def _check_increasing(self) -> None:
        """Refuse a reward that falls while π rises: several policies would then satisfy the optimality condition."""
        log_u = torch.linspace(-25.0, 25.0, 1001, dtype=torch.float64)
        reward = self.divergence.f_prime(log_u) - (1 - self.entropy_weight) * log_u
        falls = reward.diff() <= 0
        if falls.any():
            at = log_u[:-1][falls].abs().min().item()
            raise ValueError(
                f"entropy_weight={self.entropy_weight!r} under {self.divergence.name}: f'(u) - "
                f"{1 - self.entropy_weight:g} log π does not increase with π at |log u| = {at:.2g}, so the optimum is "
                "not unique. Set it to 1 or more, or choose reverse_kl, jeffreys or chi2_kl."
            )

    def reward(self, log_ratio: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Return ``β f'(u)`` of log-ratios, the whole reward if α = 1."""
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
        logprobs, rewards = batch.sequence_sum(batch.logprobs), self.reward(compared)
        if self.entropy_weight != 1:
            own = logprobs / batch.num_tokens if self.length_norm == "token" else logprobs
            rewards = rewards + self.beta * (self.entropy_weight - 1) * own
        return CompletionRewards(logprobs, log_ratio, rewards)
