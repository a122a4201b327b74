"""Frontiers of reward against divergence, estimated from samples of the reference: ideal policies and best of n."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from falign.divergences import Divergence, get, optimal_weights
from falign.evaluation.sample_scorer import SampleRow
from falign.metrics.intervals import Interval
from falign.rewards.groups import best_of_n

__all__ = [
    "IDEALS",
    "BestOfN",
    "Ideal",
    "Limit",
    "best_of_n_divergence",
    "best_of_n_frontier",
    "betas",
    "frontier_point",
    "frontier_summary",
    "ideal_frontier",
    "sample_limit",
    "with_ideals",
]

IDEALS = ("reverse_kl", "forward_kl", "jensen_shannon", "pearson_chi2")
"""Divergences whose ideal frontiers are always drawn."""

NOT_IDEAL = ("total_variation",)
"""Divergences without a line: f' has two values, so the optimal weights are 0, 1, or all that is left for the best."""

WIDEST, NARROWEST = 5.0, -9.0  # log2 of β, in standard deviations of a prompt's rewards


class Ideal(NamedTuple):
    """The point of the closed-form optimum at one β.

    Attributes:
        beta: β.
        divergence: Divergence of the axis from the reference to the optimum; may be infinite.
        own: The same in the divergence whose optimum it is.
        reward: Mean reward of the optimum.
        effective_samples: Effective number of samples per prompt, ``M/mean(w²)``; if it is small, the point is noisy.
    """

    beta: float
    divergence: float
    own: float
    reward: float
    effective_samples: float


class BestOfN(NamedTuple):
    """The point of the best of n.

    Attributes:
        n: Number of samples that the best is chosen from.
        divergence: An upper bound, exact if no two rewards tie.
        reward: Unbiased estimate of the mean reward.
    """

    n: int
    divergence: float
    reward: float


class Limit(NamedTuple):
    """The limit of all frontiers on given samples: all weight on the best sample of each prompt.

    Attributes:
        num_samples: M.
        divergence: Divergence of these weights; ``log M`` for the reverse KL without ties.
        reward: Mean of the largest reward of each prompt.
    """

    num_samples: int
    divergence: float
    reward: float


def ideal_frontier(
    rewards: Float[Tensor, "P M"], divergence: Divergence, betas: Sequence[float], *, axis: Divergence | None = None
) -> list[Ideal]:
    """Return the optima of ``E_π[r] - β D_f(π‖π_ref)`` on samples of the reference, as β falls.

    With M samples per prompt, the objective's value is on average too low, never too high, because the mean of a
    minimum over λ is at most the minimum of the mean. No reward exceeds that of the best sample, see
    :func:`sample_limit`.

    Args:
        rewards: Rewards of M samples of the reference for each of P prompts, shape (P, M).
        divergence: f.
        betas: Values of β; each is shared by all prompts.
        axis: Divergence to report; f by default.

    Source:
        ``π*/π_ref = (f')⁻¹((r - λ)/β)`` for each prompt: :func:`falign.divergences.optimal_weights`.
    """
    points = []
    for beta in sorted(betas, reverse=True):
        weights = optimal_weights(rewards.double(), divergence, beta)
        own = _mean_divergence(divergence, weights)
        points.append(
            Ideal(
                beta,
                own if axis is None else _mean_divergence(axis, weights),
                own,
                (weights * rewards).mean().item(),
                (rewards.shape[1] / weights.square().mean(dim=1)).mean().item(),
            )
        )
    return points


def betas(rewards: Float[Tensor, "P M"], divergence: Divergence, *, num: int = 57) -> list[float]:
    """Return values of β, evenly spaced in log β, from almost no change to all weight on the best samples.

    Args:
        rewards: As for :func:`ideal_frontier`; β is in units of their standard deviation within a prompt.
        divergence: f; β is divided by its curvature at 1, on which the optimum near the reference depends.
        num: Number of values.
    """
    spread = rewards.double().var(dim=-1, correction=0).mean().sqrt().item() or 1.0
    curvature = divergence.second_derivative_at_one
    unit = spread / (1.0 if math.isnan(curvature) else curvature)
    return [unit * 2**power for power in torch.linspace(WIDEST, NARROWEST, num, dtype=torch.float64).tolist()]


def best_of_n_frontier(rewards: Float[Tensor, "P M"], axis: Divergence) -> list[BestOfN]:
    """Return the points of the best of n samples of the reference, for n = 1, 2, 4 ... M.

    Args:
        rewards: Rewards of M samples of the reference for each of P prompts, shape (P, M).
        axis: Divergence to report.
    """
    size = rewards.shape[1]
    sizes = sorted({size, *(2**i for i in range(size.bit_length()) if 2**i <= size)})
    return [BestOfN(n, best_of_n_divergence(axis, n), best_of_n(rewards, n).mean().item()) for n in sizes]


def sample_limit(rewards: Float[Tensor, "P M"], axis: Divergence) -> Limit:
    """Return the point at which every ideal frontier on these samples ends; tied best samples share the weight.

    Args:
        rewards: Rewards of M samples of the reference for each of P prompts, shape (P, M).
        axis: Divergence to report.
    """
    best = (rewards == rewards.amax(dim=1, keepdim=True)).double()
    weights = best / best.mean(dim=1, keepdim=True)
    return Limit(rewards.shape[1], _mean_divergence(axis, weights), rewards.amax(dim=1).double().mean().item())


def _mean_divergence(divergence: Divergence, weights: Float[Tensor, "P M"]) -> float:
    dropped = weights == 0  # log u = -∞ there; f(0) is the slope of the dual at infinity
    values = divergence.f(weights.masked_fill(dropped, 1.0).log())
    return torch.where(dropped, divergence.dual().f_prime_at_infinity, values).mean().item()


def with_ideals(further: Iterable[Divergence]) -> dict[str, Divergence]:
    """Return the divergences whose ideal frontiers are drawn, by name: the default ones and further ones."""
    found = {divergence.name: divergence for divergence in (*map(get, IDEALS), *further)}
    return {name: divergence for name, divergence in found.items() if name not in NOT_IDEAL}


def frontier_point(label: str, metrics: Mapping[str, Interval], axis: str) -> dict[str, Any]:
    """Return the point of a policy.

    It takes the estimate of the divergence with the least variance: for the two KL divergences the one over the whole
    vocabulary, for others the one from the policy's own completions.

    Args:
        label: Name of the policy.
        metrics: Its ``reward`` and divergences.
        axis: Name of the divergence on the horizontal axis.
    """
    distance = metrics.get(f"divergence/{axis}/vocabulary", metrics.get(f"divergence/{axis}"))
    assert distance is not None, axis
    reward = metrics["reward"]
    return {
        "label": label,
        "divergence": distance.value,
        "reward": reward.value,
        "divergence_interval": [distance.low, distance.high],
        "reward_interval": [reward.low, reward.high],
    }


def frontier_summary(
    points: Sequence[Mapping[str, Any]],
    reference_groups: Sequence[Sequence[SampleRow]] | None,
    *,
    axis: tuple[str, Divergence],
    ideals: Mapping[str, Divergence],
) -> dict[str, Any]:
    """Return the points of policies, and the lines estimated from samples of the reference.

    Args:
        points: The policies, see :func:`frontier_point`.
        reference_groups: Completions of the reference, equally many for each prompt; None leaves the lines out.
        axis: Name of the divergence on the horizontal axis, and the divergence.
        ideals: Divergences whose ideal frontiers are drawn, by name.
    """
    name, divergence = axis
    found: dict[str, Any] = {"divergence": name, "points": list(points), "best_of_n": [], "ideal": {}, "limit": None}
    if reference_groups is None:
        return found
    rewards = torch.tensor([[row["reward"] for row in group] for group in reference_groups], dtype=torch.float64)
    found["best_of_n"] = [point._asdict() for point in best_of_n_frontier(rewards, divergence) if _drawn(point)]
    for each, ideal in ideals.items():
        line = ideal_frontier(rewards, ideal, betas(rewards, ideal), axis=divergence)
        found["ideal"][each] = [point._asdict() for point in line if _drawn(point)]
    limit = sample_limit(rewards, divergence)
    found["limit"] = {**limit._asdict(), "divergence": limit.divergence if _drawn(limit) else None}
    return found


def _drawn(point: Any) -> bool:
    """Return whether a point is finite; some divergences are infinite if a completion has weight 0."""
    return math.isfinite(point.divergence)


NODES = 100
EXACT_TO = 30.0  # the divergences compute f exactly for -log u up to this
# A power p of 1/u is estimated from three values of f', and the integral is infinite from p = 1/(n-1) on. With the
# decay 1 - (n-1) p of the integrand's tail, near 0 at that border:
HUGE = 1e6  # u f(u) above this at EXACT_TO: f grows faster than 1/u, so the integral is infinite for any n
INFINITE = 1e-9  # per n, a decay up to this counts as 0 and the integral as infinite
UNCERTAIN = 1e-5  # a decay below this is too small for a relative accuracy of 0.1 % of the tail
LOGARITHM = 1e-8  # a power below this comes from the terms of the size of u, so f grows as a logarithm


def best_of_n_divergence(divergence: Divergence, n: int) -> float:
    """Return ``∫₀¹ f(n t^{n-1}) dt``: the divergence of the best of n samples from the reference, for any f.

    It is exact if no two rewards tie, and an upper bound otherwise: the pair of a sample and its rank among n has this
    divergence, and leaving out the rank cannot increase it. For the reverse KL it is ``log n - (n-1)/n``.

    Args:
        divergence: f.
        n: Number of samples that the best is chosen from.

    Returns:
        The divergence, in nats for the KL divergences; inf if f grows too fast toward u = 0.

    Raises:
        ValueError: ``n`` is less than 1, or the integral is not known to 0.1 %: f grows toward u = 0 neither as a power
            nor as a logarithm, or as a power too close to ``u^{-1/(n-1)}``.

    Source:
        Beirami et al. (arXiv:2401.01879), Theorem 1 for the reverse KL; the bound for all f by data processing.

    Example:
        >>> from falign.divergences import get
        >>> print(f"{best_of_n_divergence(get('reverse_kl'), 4):.6f} {math.log(4) - 3 / 4:.6f}")
        0.636294 0.636294
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1: the best is chosen from n samples.")
    if n == 1:
        return 0.0

    # Substitute t = e^{-s}, so that log u = log n - (n-1) s. The integral is split at u = 1, where f may have a kink.
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
    """Return ``∫ e^{-s} f ds`` over ``x = -log u`` from EXACT_TO to infinity, where dx = (n-1) ds.

    There ``df/dx = -u f'(u)`` is proportional to ``e^{px}``, up to terms of the size of u: p is positive if f grows as
    a power of 1/u, 0 if it grows as a logarithm, and negative if it has a limit.

    Args:
        divergence: f.
        n: Number of samples.
        weight: ``e^{-s}`` at the beginning of the tail.
        before: The integral up to there, which the tail's error is compared with.
    """
    x = torch.tensor([EXACT_TO - 12, EXACT_TO - 6, EXACT_TO], dtype=torch.float64)
    growth = (-(-x).exp() * divergence.f_prime(-x)).tolist()
    value = divergence.f(-x)[-1].item()
    if value * math.exp(-EXACT_TO) > HUGE:
        return math.inf
    if growth[-1] <= 0:
        return weight * value
    # Two estimates of p, from intervals of 6 nats; if they differ, growth is not a power.
    earlier, power = math.log(growth[1] / growth[0]) / 6, math.log(growth[2] / growth[1]) / 6
    power = 0.0 if abs(power) < LOGARITHM else power
    decay, bend = 1 - power * (n - 1), abs(power - earlier) * (n - 1)
    if decay <= n * INFINITE and bend <= 0.01:
        return math.inf
    if decay < UNCERTAIN:
        raise ValueError(
            f"{divergence.name} grows toward u = 0 about as u^-{power:.3g}: the divergence of the best of {n} "
            "cannot be computed to 0.1 %."
        )
    rest = growth[-1] * (n - 1) / decay
    total = before + weight * (value + rest)
    if weight * rest * min(1.0, bend / decay) > 5e-4 * total:
        raise ValueError(
            f"{divergence.name} grows toward u = 0 neither as a power nor as a logarithm: the divergence of the best "
            f"of {n} cannot be computed to 0.1 %."
        )
    return weight * (value + rest)


@lru_cache
def _legendre() -> tuple[torch.Tensor, torch.Tensor]:
    nodes, weights = leggauss(NODES)
    return torch.from_numpy(nodes), torch.from_numpy(weights)
