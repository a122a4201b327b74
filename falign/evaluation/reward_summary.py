"""Summary of a reward evaluation: the benchmark's published figures with their intervals, and calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from falign.evaluation.benchmarks import Benchmark, missing_subsets
from falign.evaluation.item_scorer import ItemRow
from falign.evaluation.loading import Scored
from falign.evaluation.reward_options import RewardOptions
from falign.evaluation.summaries import RewardSummary
from falign.metrics import bootstrap

__all__ = ["CALIBRATED", "reward_summary", "scores_with_intervals", "summarize_scorer"]

CALIBRATED = ("implicit_reward", "length_normalised", "classifier")
"""Scorers whose differences are log-odds of a preference."""


def reward_summary(
    options: RewardOptions,
    scored: Scored,
    rows: Sequence[ItemRow],
    names: Sequence[str],
    *,
    skipped: Mapping[str, int],
    record: Mapping[str, Any],
) -> RewardSummary:
    """Return the summary of an evaluation, without the checksums of its files.

    Args:
        options: All options.
        scored: The policy, its reference and its objective.
        rows: One per item.
        names: Names of the scorers.
        skipped: Number of items that were not scored, by reason.
        record: All inputs that the scores depend on.
    """
    of_run = None if scored.reference is None else scored.reference.identity()["kind"]
    objective: Any = scored.objective if scored.rewarding else None
    divergence = getattr(objective, "divergence", None)
    subsets = [row["subset"] for row in rows]
    found = {
        "kind": "rewards",
        "name": options.out.name,
        "benchmark": options.benchmark.name,
        "source": options.source,
        "model": options.model,
        "reference": options.comparison.reference or of_run,
        "divergence": None if divergence is None else divergence.name,
        "beta": getattr(objective, "beta", None),
        "num_items": len(rows),
        "skipped": skipped,
        "subsets": dict(Counter(subsets)),
        "missing_subsets": list(missing_subsets(options.benchmark, subsets)),
        "scorers": {
            name: summarize_scorer(
                rows, options.benchmark, name, num_resamples=options.num_resamples, seed=options.seed
            )
            for name in names
        },
        "record": record,
    }
    return RewardSummary.model_validate(found)


def summarize_scorer(
    rows: Sequence[ItemRow], benchmark: Benchmark, name: str, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Return the scores of one scorer with their intervals, and its calibration.

    Args:
        rows: One per item.
        benchmark: Aggregates them.
        name: Name of the scorer.
        num_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        ``scores``, each with ``value``, ``low`` and ``high``; and ``calibration``, None for a scorer whose differences
        are not log-odds.
    """
    return {
        "scores": scores_with_intervals(rows, benchmark, name, num_resamples=num_resamples, seed=seed),
        "calibration": _calibration(rows, name) if name in CALIBRATED else None,
    }


def scores_with_intervals(
    rows: Sequence[ItemRow], benchmark: Benchmark, name: str, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return the benchmark's aggregation under one scorer, each value with its 95% bootstrap interval.

    Items are resampled within their subsets, those of one group together.

    Args:
        rows: One per item.
        benchmark: Aggregates them.
        name: Name of the scorer.
        num_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
    """
    units = _units(rows)
    subsets = [row["subset"] for row in rows]
    outcomes = [row["outcome"][name] for row in rows]
    names = list(benchmark.summarize(subsets, outcomes))

    def statistic(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        chosen = [i for unit in drawn for i in units[unit]]
        summary = benchmark.summarize([subsets[i] for i in chosen], [outcomes[i] for i in chosen])
        return np.array([summary[name] for name in names])

    # Stratified by subset and size of group, so that no resample lacks a subset that the aggregation needs.
    strata = [(subsets[unit[0]], len(unit)) for unit in units]
    values, low, high = bootstrap(statistic, len(units), strata=strata, num_resamples=num_resamples, seed=seed)
    return {
        each: {"value": float(values[i]), "low": float(low[i]), "high": float(high[i])} for i, each in enumerate(names)
    }


def _units(rows: Sequence[ItemRow]) -> list[list[int]]:
    """Return the indices of rows that are resampled together: those of one group, or a single row."""
    units: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        units.setdefault((row["subset"], row["group"]) if row["group"] else i, []).append(i)
    return list(units.values())


def _calibration(rows: Sequence[ItemRow], name: str) -> dict[str, Any]:
    """Return the calibration of σ(margin) as the probability of each pair's preference."""
    from falign.metrics.calibration import calibration

    margins = [
        score - other
        for row in rows
        for score, value in zip(row["scores"][name], row["preference"], strict=True)
        for other, other_value in zip(row["scores"][name], row["preference"], strict=True)
        if value > other_value
    ]
    summary = calibration(margins)
    bins = [{"confidence": b.confidence, "accuracy": b.accuracy, "count": b.count} for b in summary.bins]
    return {"ece": summary.ece, "brier": summary.brier, "bins": bins}
