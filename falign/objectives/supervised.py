"""Supervised fine-tuning, plain or with an f-divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from falign.divergences import Divergence
from falign.divergences.powers import power
from falign.objectives.base import BaseObjective, CompletionBatch, ObjectiveOutput
from falign.objectives.groups import completion_term

__all__ = ["Supervised"]


@dataclass(frozen=True)
class Supervised(BaseObjective):
    """``-log π`` of each token of demonstrations; with a divergence ``f*(-β log u)/β``, a mean over tokens.

    Demonstrations are assumed to be optimal for ``E[r] - D_f``, with implicit reward ``r = β log u`` of each token. The
    gradient is then that of ``-log π``, weighted by ``w = (f')⁻¹(-β log u)``: 1 at the reference, less for tokens that
    became more likely, more for tokens that became less likely. As β goes to 0 all weights go to 1: plain fine-tuning.

    The ratio is taken per token, as in the token mean of plain fine-tuning: whole completions have log-ratios of
    hundreds of nats, where w is 0 or overflows, and β would have to depend on the length.

    Attributes:
        divergence: f; ``f'(∞)`` must be infinite. None for plain fine-tuning, which corresponds to total variation.
        beta: β; required with a divergence, not allowed without one.

    Raises:
        ValueError: ``f'(∞)`` is finite, or only one of divergence and β is given, or β is not positive.

    Source:
        Wang et al. (arXiv:2507.00018), with ``φ(x) = -f*(-x)``; divided by β, so that the step size does not
        depend on it.

    Example:
        >>> from falign import divergences
        >>> logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> batch = CompletionBatch(
        ...     logprobs=logprobs,
        ...     reference_logprobs=torch.tensor([[-2.0, -2.0]]),
        ...     completion_mask=torch.ones(1, 2, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0]),
        ... )
        >>> Supervised(divergences.get("pearson_chi2"), beta=1.0)(batch).mean().backward()
        >>> logprobs.grad  # weights 1 - log u/2, of two tokens
        tensor([[-0.2500, -0.5000]])
    """

    divergence: Divergence | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        if (self.divergence is None) != (self.beta is None):
            raise ValueError(
                f"divergence={self.divergence!r} with beta={self.beta!r}: give both, or neither for plain fine-tuning."
            )
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta!r} must be positive and finite.")
        if self.divergence is not None and math.isfinite(self.divergence.f_prime_at_infinity):
            slope = self.divergence.f_prime_at_infinity
            raise ValueError(
                f"f-SFT is not defined under {self.divergence.name}: its f'(∞) = {slope:g} is finite, so the loss "
                f"f*(-β log u) is infinite as soon as log u < {-slope:g}/β, just where a "
                "token has become unlikely and the loss should raise it. Choose a divergence with infinite f'(∞) "
                "(reverse_kl, jeffreys, pearson_chi2, chi2_kl), or none for plain fine-tuning."
            )

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset() if self.divergence is None else frozenset({"reference_logprobs"})

    @property
    @override
    def imitates(self) -> bool:
        return True

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return the loss of each completion, to be averaged over tokens.

        Args:
            batch: Demonstrations, with ``reference_logprobs`` if there is a divergence.

        Returns:
            One term of shape (N,) that is a mean over tokens, and the metrics ``nll`` (mean over tokens) and, with a
            divergence, ``logratios/policy`` (``log u`` of the whole) and ``token_weight`` (mean of w) of each.

        Raises:
            ValueError: There is a divergence and ``reference_logprobs`` is None.
        """
        per_token, weights = self._losses(batch)
        metrics = {"nll": -batch.sequence_sum(batch.logprobs) / batch.num_tokens}
        if self.divergence is not None:
            metrics["logratios/policy"] = batch.sequence_sum(batch.log_ratio)
            metrics["token_weight"] = batch.sequence_sum(weights) / batch.num_tokens
        term = completion_term(batch.sequence_sum(per_token), batch.num_tokens, "token_mean", name="supervised")
        return ObjectiveOutput((term,), {name: value.detach() for name, value in metrics.items()})

    def _losses(self, batch: CompletionBatch) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
        """The loss of each token and its weight w on ``-∇log π``."""
        logprobs = batch.logprobs.masked_fill(~batch.completion_mask, 0.0)
        if self.divergence is None or self.beta is None:
            return -logprobs, torch.ones_like(logprobs)
        with torch.no_grad():
            log_u = batch.log_ratio
            value = self.divergence.conjugate(-self.beta * log_u) / self.beta
            weights = power(self.divergence.f_prime_inverse(-self.beta * log_u).clamp(-1e4, 1e4))
        # Autograd cannot differentiate every family's (f')⁻¹, but d f*(y)/dy = (f')⁻¹(y) in closed form.
        return value - weights * (logprobs - logprobs.detach()), weights
