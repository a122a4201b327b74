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
        divergence: f. None for plain fine-tuning.
        beta: β; required with a divergence, not allowed without one.
        max_weight: W, larger than 1: where ``w > W`` the loss continues as its tangent, so that no token weighs more.
            Required if ``f'(∞)`` is finite: the loss is then infinite at ``log u ≤ -f'(∞)/β``. None for no bound.

    Raises:
        ValueError: ``f'(∞)`` is finite without a bound, only one of divergence and β is given, or a number is out of
            range.

    Source:
        Wang et al. (arXiv:2507.00018), with ``φ(x) = -f*(-x)``; divided by β, so that the step size does not
        depend on it. With ``x = β log u`` of a token, ``pearson_chi2`` has ``φ(x) = x - x²/4`` and
        ``squared_hellinger`` has ``φ(x) = x/(1 + x)``, whose pole at -1 is why the weight is bounded. For total
        variation the paper has ``φ(x) = x``, which is plain fine-tuning; its exact conjugate is this only for
        ``|x| ≤ ½``: with ``total_variation`` a token has weight 1 there, 0 above and W below.

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
    max_weight: float | None = None

    def __post_init__(self) -> None:
        if (self.divergence is None) != (self.beta is None):
            raise ValueError(
                f"divergence={self.divergence!r} with beta={self.beta!r}: give both, or neither for plain fine-tuning."
            )
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta!r} must be positive and finite.")
        if self.max_weight is not None and self.divergence is None:
            raise ValueError(f"max_weight={self.max_weight!r} without a divergence: all weights are 1; leave it out.")
        if self.max_weight is not None and not 1 < self.max_weight < math.inf:
            raise ValueError(
                f"max_weight={self.max_weight!r} must be finite and larger than 1, the weight at the reference."
            )
        unbounded = self.divergence is not None and self.max_weight is None
        if self.divergence is not None and unbounded and math.isfinite(self.divergence.f_prime_at_infinity):
            slope = self.divergence.f_prime_at_infinity
            raise ValueError(
                f"f-SFT is not defined under {self.divergence.name}: its f'(∞) = {slope:g} is finite, so the loss "
                f"f*(-β log u) is infinite as soon as log u < {-slope:g}/β, just where a "
                "token has become unlikely and the loss should raise it. Set max_weight (10, for "
                "example), beyond which the loss is continued as its tangent. Or choose a "
                "divergence with infinite f'(∞) (reverse_kl, jeffreys, pearson_chi2, chi2_kl), or none for plain "
                "fine-tuning."
            )

    @property
    @override
    def reads_row_weights(self) -> bool:
        return True

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
        term = term._replace(weights=batch.weighted(term.weights))
        return ObjectiveOutput((term,), {name: value.detach() for name, value in metrics.items()})

    def _losses(self, batch: CompletionBatch) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
        """The loss of each token and its weight w on ``-∇log π``."""
        logprobs = batch.logprobs.masked_fill(~batch.completion_mask, 0.0)
        if self.divergence is None or self.beta is None:
            return -logprobs, torch.ones_like(logprobs)
        with torch.no_grad():
            y = -self.beta * batch.log_ratio
            inside, beyond = self._within_bound(y)
            weights = power(self.divergence.f_prime_inverse(inside).clamp(-1e4, 1e4))
            value = self.divergence.conjugate(inside)
            if self.max_weight is not None:
                weights = torch.where(beyond > 0, self.max_weight, weights.clamp(max=self.max_weight))
                value = value + self.max_weight * beyond
            value = value / self.beta
        # Autograd cannot differentiate every family's (f')⁻¹, but d f*(y)/dy = (f')⁻¹(y) in closed form.
        return value - weights * (logprobs - logprobs.detach()), weights

    def _within_bound(self, y: Float[Tensor, "N T"]) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
        """Return y up to ``f'(W)``, where the weight is W, and by how much it is beyond."""
        if self.max_weight is None or self.divergence is None:
            return y, torch.zeros_like(y)
        bound = self.divergence.f_prime(y.new_tensor(math.log(self.max_weight)))
        return torch.minimum(y, bound), (y - bound).clamp(min=0.0)
