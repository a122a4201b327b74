"""The frontier as plain values, for a summary, a JSON file or a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from falign.divergences import Divergence
from falign.evaluation.frontier import best_of_n_frontier, betas, ideal_frontier, sample_limit
from falign.evaluation.sample_rows import SampleRow
from falign.metrics.intervals import Interval

__all__ = ["IDEALS", "frontier_point", "frontier_summary"]

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
