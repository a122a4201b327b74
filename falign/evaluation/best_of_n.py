"""How far the best of n samples is from a single one, under any divergence."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from numpy.polynomial.laguerre import laggauss
from numpy.polynomial.legendre import leggauss

from falign.divergences import Divergence

__all__ = ["best_of_n_divergence"]

NODES = 100
EXACT_TO = 24.0  # nats below 1 to which the divergences compute a power of u exactly
ASYMPTOTIC = 100.0  # nats below 1 from which on a divergence without such a power is linear in log u
NEGLIGIBLE_POWER = 0.02


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
        ValueError: ``n`` is less than 1.

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

    power = _power_at_zero(divergence)
    at_one, far = math.log(n) / (n - 1), (math.log(n) + (EXACT_TO if power else ASYMPTOTIC)) / (n - 1)
    total = 0.0
    for start, end in ((0.0, at_one), (at_one, far)):
        nodes, weights = _legendre()
        s = start + (end - start) * (nodes + 1) / 2
        total += (weights * f(s) * torch.exp(-s)).sum().item() * (end - start) / 2
    if power:
        decay = 1 - power * (n - 1)
        last = f(torch.tensor(far, dtype=torch.float64)).item() * math.exp(-far)
        return total + last / decay if decay > 1e-3 else math.inf
    nodes, weights = _laguerre()
    return total + (weights * f(far + nodes)).sum().item() * math.exp(-far)


def _power_at_zero(divergence: Divergence) -> float:
    """Return p where ``f(u) ~ u^{-p}`` as u → 0; 0 where f is bounded there or grows as a logarithm."""
    if divergence.dual().f_prime_at_infinity < math.inf:  # which is f(0)
        return 0.0
    log_u = torch.tensor([-16.0, -EXACT_TO], dtype=torch.float64)
    elasticity = -log_u.exp() * divergence.f_prime(log_u) / divergence.f(log_u)
    # A logarithm's is about -1/log u, which falls out of the slope of its product with log u.
    power = ((log_u * elasticity).diff() / log_u.diff()).item()
    return elasticity[1].item() if power > NEGLIGIBLE_POWER else 0.0


@lru_cache
def _legendre() -> tuple[torch.Tensor, torch.Tensor]:
    nodes, weights = leggauss(NODES)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


@lru_cache
def _laguerre() -> tuple[torch.Tensor, torch.Tensor]:
    nodes, weights = laggauss(20)
    return torch.from_numpy(nodes), torch.from_numpy(weights)
