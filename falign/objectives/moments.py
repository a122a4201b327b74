"""Fitting of moment constraints: the λ for which the reweighted reference has given moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from falign.divergences.base import numbers

__all__ = ["fit_moments"]

NEWTON_STEPS = 200
HALVINGS = 50


def fit_moments(
    features: Shaped[Tensor, "M K"],
    moments: Sequence[float] | Shaped[Tensor, " K"],
    *,
    log_weights: Shaped[Tensor, " M"] | None = None,
    tolerance: float = 1e-8,
) -> Float[Tensor, " K"]:
    """Return λ such that ``Σ_i w_i φ_i = μ`` with ``w_i ∝ exp(λ·φ_i)``, on samples of the reference.

    Args:
        features: φ of each sample, shape (M, K).
        moments: μ, K numbers.
        log_weights: Additional log-weights, shape (M,), nats: ``log π_ref/q`` if the samples come from another
            distribution q, or the score of another target to satisfy too. Samples of weight 0 (-inf) are left out.
        tolerance: Largest error of a moment, as a share of its feature's range in the samples.

    Returns:
        λ, shape (K,), float64, without gradient; the smallest solution if features are linearly dependent.

    Raises:
        ValueError: The shapes disagree, a value is NaN or infinite, or no weighting of the samples reaches the
            moments (the message names them): μ must be inside the convex hull of the samples.

    Source:
        Khalifa et al., GDC (arXiv:2012.11635), Section 2.3, by gradient steps; here by Newton's method on the convex
        dual ``log Σ exp(λ·φ) - λ·μ``, whose gradient is ``Σ w φ - μ``.

    Example:
        >>> fit_moments(torch.tensor([[0.0], [0.0], [0.0], [1.0]]), [0.5])  # 1/4 has to count e^λ = 3 times
        tensor([1.0986], dtype=torch.float64)
    """
    phi = numbers(features, "features").detach().double()
    base = phi.new_zeros(len(phi))
    if log_weights is not None:
        base = numbers(log_weights, "log_weights").detach().double()
        phi, base = phi[base != -torch.inf], base[base != -torch.inf]
    for name, value in {"features": phi, "log_weights": base}.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} has a value that is NaN or infinite: leave that sample out.")
    mu = torch.as_tensor(moments, dtype=torch.float64, device=phi.device)
    if mu.shape != phi.shape[1:] or len(phi) == 0:
        raise ValueError(
            f"features has shape {tuple(phi.shape)} for {mu.numel()} moments; one column for each is needed."
        )
    low, high = phi.amin(dim=0), phi.amax(dim=0)
    span = high - low
    # A feature with one value in all samples needs no λ if that value is μ.
    fixed = (span == 0) & ((mu - low).abs() <= tolerance * low.abs().clamp(min=1.0))
    if (outside := ~fixed & ~((low < mu) & (mu < high))).any():
        raise ValueError(_unreachable(outside, mu, low, high, len(phi)))
    # Shift by μ and scale by each feature's range: at the dual's minimum the weighted mean is 0.
    x = (phi - mu) / span.where(span > 0, torch.ones_like(span))
    lam = torch.zeros_like(mu)
    for _ in range(NEWTON_STEPS):
        weights = (base + x @ lam).softmax(dim=0)
        slope = weights @ x
        if slope.abs().max() <= tolerance:
            return lam / span.where(span > 0, torch.ones_like(span))
        if (x @ lam).max() < 0:  # every sample lies on one side of μ: the dual has no minimum
            break
        # The dual's Hessian is the weighted covariance; singular if features depend on each other, hence pinv.
        curvature = (x - slope).T @ (weights[:, None] * (x - slope))
        step = torch.linalg.pinv(curvature, hermitian=True) @ slope
        lam = _descend(base, x, lam, step, slope)
    raise ValueError(_unreachable(_in_the_way(x, lam), mu, low, high, len(phi)))


def _descend(base: Tensor, x: Tensor, lam: Tensor, step: Tensor, slope: Tensor) -> Tensor:
    """Take Newton's step, halved until the dual decreases sufficiently (Armijo condition)."""
    value, size = (base + x @ lam).logsumexp(dim=0), 1.0
    for _ in range(HALVINGS):
        candidate = lam - size * step
        # The slack covers rounding: close to the minimum the dual no longer decreases.
        if (base + x @ candidate).logsumexp(dim=0) <= value - 1e-4 * size * (slope @ step) + 1e-14 * (1 + value.abs()):
            return candidate
        size /= 2
    return lam


def _in_the_way(x: Tensor, lam: Tensor) -> Tensor:
    """Mark the features that λ needs to separate the samples from the moments; all if λ does not separate them."""
    for k in lam.abs().argsort().tolist():
        without = lam.index_fill(0, torch.tensor([k], device=lam.device), 0.0)
        if (x @ without).max() < 0:  # the others alone still separate them
            lam = without
    return lam != 0


def _unreachable(which: Tensor, mu: Tensor, low: Tensor, high: Tensor, num_samples: int) -> str:
    named = [
        f"{k} (wanted {mu[k].item():g}, samples {low[k].item():g} to {high[k].item():g})"
        for k in torch.nonzero(which).flatten().tolist()
    ]
    together = " together" if len(named) > 1 else ""
    return (
        f"moments of feature {', '.join(named)}{together} cannot be reached by weighing {num_samples} samples of the "
        "reference: they must lie inside the samples' convex hull; take more samples or milder moments (a feature that "
        "must always hold is a BinaryConstraint)."
    )
