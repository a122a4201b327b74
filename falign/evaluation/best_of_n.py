"""Divergence of the best of n samples from a single sample, for any f."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from numpy.polynomial.legendre import leggauss

from falign.divergences import Divergence

__all__ = ["best_of_n_divergence"]

NODES = 100
EXACT_TO = 30.0  # nats below 1 to which the divergences compute f exactly
HUGE = 1e6  # of u f(u) at the end: f grows faster than 1/u, and has left what a float64 of it holds
BORDER = 1e-9  # of 1 - (n-1) p below which the power p is too near to 1/(n-1) to tell the integral from an infinite one
TELLING = 1e-5
LOGARITHM = 1e-8  # a power below this is what the terms of the size of u leave of a logarithm


def best_of_n_divergence(divergence: Divergence, n: int) -> float:
    """Return ``∫₀¹ f(n t^{n-1}) dt``: the divergence of the best of n from the reference where no two rewards tie.

    It is an upper bound where they may tie: the sample with its rank among n is at this distance, and to forget the
    rank can only bring it nearer. For the reverse KL it is ``log n - (n-1)/n``.

    Args:
        divergence: f.
        n: Samples that the best is taken of.

    Returns:
        Nats, or what f is measured in; inf where f grows too fast towards u = 0.

    Raises:
        ValueError: ``n`` is less than 1, or f grows towards u = 0 neither as a power nor as a logarithm, or as a power
            so near to ``u^{-1/(n-1)}`` that its integral is not known to 0.1 %.

    Source:
        Beirami et al. (arXiv:2401.01879), Theorem 1 for the reverse KL; the bound for all f by data processing.

    Example:
        >>> from falign.divergences import get
        >>> print(f"{best_of_n_divergence(get('reverse_kl'), 4):.6f} {math.log(4) - 3 / 4:.6f}")
        0.636294 0.636294
    """
    if n < 1:
        raise ValueError(f"n={n}: the best is taken of 1 sample or more.")
    if n == 1:
        return 0.0

    # With t = e^{-s} and log u = log n - (n-1) s, from the largest u through u = 1, where f may have a kink, to 0.
    def f(s: torch.Tensor) -> torch.Tensor:
        return divergence.f(math.log(n) - (n - 1) * s)

    at_one, end = math.log(n) / (n - 1), (math.log(n) + EXACT_TO) / (n - 1)
    total = 0.0
    nodes, weights = _legendre()
    for start, stop in ((0.0, at_one), (at_one, end)):
        s = start + (stop - start) * (nodes + 1) / 2
        total += (weights * f(s) * torch.exp(-s)).sum().item() * (stop - start) / 2
    return total + _tail(divergence, n, math.exp(-end), before=total)


def _tail(divergence: Divergence, n: int, weight: float, *, before: float) -> float:
    """``∫ e^{-s} f ds`` where ``x = -log u`` goes on from EXACT_TO to infinity, by ``n - 1`` for each s.

    There ``df/dx = -u f'(u)`` is a pure exponential ``e^{px}`` of x up to terms of the size of u: p is positive where
    f grows as a power of 1/u, 0 where it grows as a logarithm, and negative where it has a limit.
    """
    x = torch.tensor([EXACT_TO - 12, EXACT_TO - 6, EXACT_TO], dtype=torch.float64)
    growth = (-(-x).exp() * divergence.f_prime(-x)).tolist()
    value = divergence.f(-x)[-1].item()
    if value * math.exp(-EXACT_TO) > HUGE:
        return math.inf
    if growth[-1] <= 0:
        return weight * value
    earlier, power = math.log(growth[1] / growth[0]) / 6, math.log(growth[2] / growth[1]) / 6
    power = 0.0 if abs(power) < LOGARITHM else power
    decay, bend = 1 - power * (n - 1), abs(power - earlier) * (n - 1)
    if decay <= n * BORDER and bend <= 0.01:
        return math.inf
    if decay < TELLING:
        raise ValueError(
            f"{divergence.name} grows towards u = 0 as u^-{power:.3g} or nearly so: how far the best of {n} is "
            "cannot be computed to 0.1 %."
        )
    rest = growth[-1] * (n - 1) / decay
    total = before + weight * (value + rest)
    if weight * rest * min(1.0, bend / decay) > 5e-4 * total:
        raise ValueError(
            f"{divergence.name} grows towards u = 0 neither as a power nor as a logarithm: how far the best of {n} is "
            "cannot be computed to 0.1 %."
        )
    return weight * (value + rest)


@lru_cache
def _legendre() -> tuple[torch.Tensor, torch.Tensor]:
    nodes, weights = leggauss(NODES)
    return torch.from_numpy(nodes), torch.from_numpy(weights)
