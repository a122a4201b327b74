"""Reward against divergence: what training reached, and what samples of the reference say could be reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from falign.divergences import Divergence, optimal_weights
from falign.evaluation.best_of_n import best_of_n_divergence
from falign.rewards.groups import best_of_n

__all__ = ["BestOfN", "Ideal", "Limit", "best_of_n_frontier", "betas", "ideal_frontier", "sample_limit"]

WIDEST, NARROWEST = 5.0, -9.0  # log2 of β, in standard deviations of a prompt's rewards


class Ideal(NamedTuple):
    """Where the closed-form optimum of one β lies.

    Attributes:
        beta: β.
        divergence: Of the optimum from the reference, in the divergence of the axis; inf where that is.
        own: The same in the divergence that it is the optimum of.
        reward: Mean reward of the optimum.
        effective_samples: How many samples of a prompt share the weight, ``M/mean(w²)``; few of them say little.
    """

    beta: float
    divergence: float
    own: float
    reward: float
    effective_samples: float


class BestOfN(NamedTuple):
    """Where the best of n lies.

    Attributes:
        n: Samples that the best is taken of.
        divergence: A bound from above, exact where no two rewards tie.
        reward: Unbiased.
    """

    n: int
    divergence: float
    reward: float


class Limit(NamedTuple):
    """The end of what samples can say: all weight on the best sample of each prompt.

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
    """Return values of β, evenly spaced in the logarithm, from where nothing moves to where all weight is on the best.

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
    """Return where every ideal frontier on these samples ends, in equal parts where several are the best.

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
