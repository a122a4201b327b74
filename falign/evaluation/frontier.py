"""Reward against divergence: trained policies, and the frontiers estimated from samples of the reference."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from falign.divergences import Divergence, optimal_weights
from falign.durable import writing
from falign.errors import ConfigError
from falign.evaluation.best_of_n import best_of_n_divergence
from falign.evaluation.sample_rows import SampleRow
from falign.metrics.intervals import Interval
from falign.rewards.groups import best_of_n

__all__ = [
    "IDEALS",
    "BestOfN",
    "Ideal",
    "Limit",
    "best_of_n_frontier",
    "betas",
    "check_picture",
    "frontier_point",
    "frontier_summary",
    "ideal_frontier",
    "plot_frontier",
    "sample_limit",
]


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


POLICY, BEST, LIMIT = "#c8553d", "#3d405b", "0.55"
LINES = ("#0b7a75", "#5b8e7d", "#b08968", "#7d5ba6", "#4d7ea8", "#8a817c")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))
ROOM = 1.15
FEW = 5.0  # samples of a prompt that share the weight of an ideal; below, its line is faint


def plot_frontier(data: Mapping[str, Any], path: Path) -> None:
    """Draw policies as dots with their intervals, the best of n, and the ideal of each divergence.

    Args:
        data: As :func:`falign.evaluation.frontier.frontier_summary` returns it.
        path: The picture; its suffix says which kind.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.6, 5.0), layout="constrained")
    for i, (name, line) in enumerate(data["ideal"].items()):
        color, style = LINES[i % len(LINES)], STYLES[i % len(STYLES)]
        known = [point for point in line if point["effective_samples"] >= FEW]
        # The last point that is known belongs to both parts.
        for part, alpha in ((known, 1.0), (line[max(len(known) - 1, 0) :], 0.3)):
            xs, ys = ([point[key] for point in part] for key in ("divergence", "reward"))
            label = f"ideal of {_spoken(name)}" if part is known else None
            axis.plot(xs, ys, color=color, linestyle=style, linewidth=1.6, alpha=alpha, label=label)
    if best := data["best_of_n"]:
        xs, ys = ([point[key] for point in best] for key in ("divergence", "reward"))
        axis.plot(xs, ys, color=BEST, linewidth=1.0, marker="o", markersize=3.5, label="best of n (bound)")
        for point in best:
            axis.annotate(
                str(point["n"]), (point["divergence"], point["reward"]), (3, -9), textcoords="offset points",
                fontsize=7, color=BEST,
            )  # fmt: skip
    _draw_limit(axis, data)
    runs: defaultdict[str, list[Any]] = defaultdict(list)
    for point in data["points"]:
        runs[point.get("run", point["label"])].append(point)
    for number, points in enumerate(runs.values()):
        xs, ys = ([point[key] for point in points] for key in ("divergence", "reward"))
        axis.plot(xs, ys, color=POLICY, linewidth=1.0, alpha=0.6)
        for point in points:
            x, y = point["divergence"], point["reward"]
            spans = [[[v - low], [high - v]] for v, (low, high) in
                     ((x, point["divergence_interval"]), (y, point["reward_interval"]))]  # fmt: skip
            axis.errorbar([x], [y], xerr=spans[0], yerr=spans[1], color=POLICY, marker="D", markersize=5, linewidth=0.9)
            axis.annotate(
                point["label"], (x, y), (7, (5, -12)[number % 2]), textcoords="offset points", fontsize=8, color=POLICY
            )
    axis.set_xlim(left=0)
    axis.set_xlabel(f"{_spoken(data['divergence'])} to the reference (nats)")
    axis.set_title("mean reward", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[1]:
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    with writing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    plt.close(figure)


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be written, before anything is computed.

    Raises:
        ConfigError: The suffix is not that of a picture, or the folder does not exist.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in kinds or not path.absolute().parent.is_dir():
        raise ConfigError(
            f"out={path}: give a file in an existing folder with one of the suffixes json, {', '.join(kinds)}."
        )


def _spoken(name: str) -> str:
    return name.replace("_", " ").replace(" kl", " KL")


def _draw_limit(axis: Any, data: Mapping[str, Any]) -> None:
    """Mark the limit of the samples of the reference, where the lines end."""
    limit = data["limit"]
    if limit is None:
        return
    axis.axhline(limit["reward"], color=LIMIT, linewidth=0.8, linestyle=(0, (2, 3)))
    axis.annotate(
        f"best of {limit['num_samples']} reference samples: the lines end here",
        (0.01, limit["reward"]), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        fontsize=7, color="0.4",
    )  # fmt: skip
    far = [point["divergence"] for point in data["points"]]
    ends = [line[-1]["divergence"] for line in data["ideal"].values() if line]
    # As β falls, the ideal line is unbounded for a divergence that penalizes lost support.
    shown = max([limit["divergence"] or 0.0, *far, *(point["divergence"] for point in data["best_of_n"])])
    if max(ends, default=0.0) > ROOM * shown > 0:
        axis.set_xlim(right=ROOM * shown)


IDEALS = ("reverse_kl", "forward_kl", "jensen_shannon", "pearson_chi2")
"""The divergences whose ideal frontiers are always there."""


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
