"""The closed-form optimum of ``E_π[r] - β D_f(π‖π_ref)``, on samples of the reference."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from falign.divergences.base import Divergence, numbers

__all__ = ["optimal_weights"]

BISECTIONS = 100


def optimal_weights(rewards: Shaped[Tensor, "*P M"], divergence: Divergence, beta: float) -> Float[Tensor, "*P M"]:
    """Return ``w_i = π*(y_i)/π_ref(y_i)`` of the policy that maximizes ``E_π[r] - β D_f(π‖π_ref)``.

    ``w_i = (f')⁻¹((r_i - λ)/β)``, 0 where that is below ``f'(0+)``, with λ such that the mean of w is 1.

    Args:
        rewards: ``r_i`` of M samples of the reference, shape (..., M); each row has its own λ.
        divergence: f, any; a barrier is not needed.
        beta: β, nats of reward; positive.

    Returns:
        Shape (..., M), not negative, of mean 1 in each row, without gradient; computed in float64.

    Raises:
        ValueError: There are no rewards, one of them is NaN or infinite, or β is not positive and finite.

    Source:
        Wang et al., f-DPO (arXiv:2309.16240), Theorem 1; the multiplier of ``π ≥ 0`` is not 0 where f has no barrier.

    Example:
        >>> from falign.divergences import get
        >>> rewards = torch.tensor([0.0, 0.0, 1.0])
        >>> optimal_weights(rewards, get("reverse_kl"), beta=0.5)  # proportional to exp(r/β)
        tensor([0.3195, 0.3195, 2.3610])
        >>> optimal_weights(rewards, get("pearson_chi2"), beta=0.1)  # the worst get weight 0
        tensor([0., 0., 3.])
    """
    if rewards.ndim == 0 or rewards.numel() == 0:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; one reward for each of one or more samples.")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta!r} must be positive and finite.")
    rewards = numbers(rewards, "rewards").detach()
    if not (finite := torch.isfinite(rewards)).all():
        place = (~finite).nonzero()[0].tolist()
        raise ValueError(f"rewards{place} is {rewards[~finite][0].item()}; each reward must be finite.")
    r = rewards.double()
    # λ is as accurate as the rounding of r, which after this shift is smallest for the largest weights.
    r = r - r.amax(dim=-1, keepdim=True)

    def weights(multiplier: Tensor) -> Tensor:
        return divergence.f_prime_inverse((r - multiplier) / beta).exp()

    # f'(1) = 0, so that at λ = min r all w ≥ 1, at λ = max r all w ≤ 1, and in between w falls with λ.
    low, high = r.amin(dim=-1, keepdim=True), r.amax(dim=-1, keepdim=True)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_many = weights(middle).mean(dim=-1, keepdim=True) > 1
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    # `high` gives a mean of at most 1 and `low` of at least 1; interpolate between the two to a mean of exactly 1.
    w, above = weights(high), weights(low)
    # If f' jumps at its upper end (total variation), the best samples share the missing weight equally.
    best = torch.isinf(above)
    step = torch.where(best.any(dim=-1, keepdim=True), best.double(), above - w)
    missing = 1 - w.mean(dim=-1, keepdim=True)
    tiny = torch.finfo(r.dtype).tiny
    return (w + step * missing / step.mean(dim=-1, keepdim=True).clamp(min=tiny)).to(rewards.dtype)
