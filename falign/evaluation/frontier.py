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
"""The divergences whose ideal frontiers are always drawn."""

NOT_IDEAL = ("total_variation",)
"""Divergences without a line: f' has two values, so the optimal weights are 0, 1, or all that is left for the best."""

WIDEST, NARROWEST = 5.0, -9.0  # log2 of β, in standard deviations of a prompt's rewards


class Ideal(NamedTuple):
    """The point of the closed-form optimum at one β.

    Attributes:
        beta: β.
        divergence: Divergence of the axis from the reference to the optimum; may be infinite.
        own: The same in the divergence of which it is the optimum.
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
        divergence: Of these weights; ``log M`` under the reverse KL where one sample is the best.
        reward: Mean of the largest rewards.
    """

    num_samples: int
    divergence: float
    reward: float


def ideal_frontier(
    rewards: Float[Tensor, "P M"], divergence: Divergence, betas: Sequence[float], *, axis: Divergence | None = None
) -> list[Ideal]:
    """Return the optima of ``E_π[r] - β D_f(π‖π_ref)`` on samples of the reference, as β falls.

    With M samples per prompt, the objective's value is too low on average, never too high (the mean of a minimum over
    λ is no more than the minimum of the mean), and no reward is above that of the best sample: see
    :func:`sample_limit`.

    Args:
        rewards: Of M samples of the reference for each of P prompts.
        divergence: f.
        betas: Each is shared by all prompts.
        axis: What divergences are measured in; f where left out.

    Source:
        ``π*/π_ref = (f')⁻¹((r - λ)/β)``: :func:`falign.divergences.optimal_weights`, an average over prompts.
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
    """Return values of β, evenly spaced in the logarithm, from no change to all weight on the best samples.

    Args:
        rewards: As for :func:`ideal_frontier`; their spread within prompts is the unit.
        divergence: f; its curvature at 1 is the unit of its strength.
        num: How many.
    """
    spread = rewards.double().var(dim=-1, correction=0).mean().sqrt().item() or 1.0
    curvature = divergence.second_derivative_at_one
    unit = spread / (1.0 if math.isnan(curvature) else curvature)
    return [unit * 2**power for power in torch.linspace(WIDEST, NARROWEST, num, dtype=torch.float64).tolist()]


def best_of_n_frontier(rewards: Float[Tensor, "P M"], axis: Divergence) -> list[BestOfN]:
    """Return the best of n = 1, 2, 4 ... M samples of the reference.

    Args:
        rewards: Of M samples of the reference for each of P prompts.
        axis: What divergences are measured in.
    """
    size = rewards.shape[1]
    sizes = sorted({size, *(2**i for i in range(size.bit_length()) if 2**i <= size)})
    return [BestOfN(n, best_of_n_divergence(axis, n), best_of_n(rewards, n).mean().item()) for n in sizes]


def sample_limit(rewards: Float[Tensor, "P M"], axis: Divergence) -> Limit:
    """Return the point at which every ideal frontier on these samples ends, with equal weights on tied best samples.

    Args:
        rewards: Of M samples of the reference for each of P prompts.
        axis: What divergences are measured in.
    """
    best = (rewards == rewards.amax(dim=1, keepdim=True)).double()
    weights = best / best.mean(dim=1, keepdim=True)
    return Limit(rewards.shape[1], _mean_divergence(axis, weights), rewards.amax(dim=1).double().mean().item())


def _mean_divergence(divergence: Divergence, weights: Float[Tensor, "P M"]) -> float:
    given_up = weights == 0
    values = divergence.f(weights.masked_fill(given_up, 1.0).log())
    at_zero = divergence.dual().f_prime_at_infinity  # f(0)
    return torch.where(given_up, at_zero, values).mean().item()


def with_ideals(further: Iterable[Divergence]) -> dict[str, Divergence]:
    """Return the divergences whose ideal frontiers are drawn, by name: the default ones and further ones."""
    found = {divergence.name: divergence for divergence in (*map(get, IDEALS), *further)}
    return {name: divergence for name, divergence in found.items() if name not in NOT_IDEAL}


def frontier_point(label: str, metrics: Mapping[str, Interval], axis: str) -> dict[str, Any]:
    """Return the point of a policy.

    Of the estimates of a divergence the one that varies least is taken: for the two KL divergences that of the whole
    vocabulary, else that of the policy's own completions.

    Args:
        label: What it is called.
        metrics: Its ``reward`` and divergences.
        axis: Name of the divergence on the axis.
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
    """Return points, and the lines estimated from samples of the reference.

    Args:
        points: Of policies.
        reference_groups: Completions of the reference, equally many of each prompt; None leaves the lines out.
        axis: Name of the divergence that is measured, and the divergence.
        ideals: Those whose closed-form optima are drawn, by name.
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
    """Return whether a point is finite; some divergences are infinite if the policy drops completions."""
    return math.isfinite(point.divergence)


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
