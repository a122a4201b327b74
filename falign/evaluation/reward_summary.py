"""Summary of the rows of a benchmark: the published aggregation with its intervals, and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from falign.evaluation.benchmarks import Benchmark
from falign.evaluation.score_items import ItemRow
from falign.metrics import bootstrap

__all__ = ["CALIBRATED", "scores_with_intervals", "summarize_scorer"]

CALIBRATED = ("implicit_reward", "length_normalised", "classifier")
"""Scorers whose differences are log-odds of a preference."""


def summarize_scorer(
    rows: Sequence[ItemRow], benchmark: Benchmark, name: str, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Return the scores of one scorer with their intervals, and its calibration.

    Args:
        rows: Of all items.
        benchmark: How they are aggregated.
        name: The scorer.
        num_resamples: Of the bootstrap.
        seed: Of the resampling.

    Returns:
        ``scores``, each with ``value``, ``low`` and ``high``, and ``calibration``: None for a scorer whose differences
        are no log-odds.
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
        rows: Of all items.
        benchmark: How they are aggregated.
        name: The scorer.
        num_resamples: Of the bootstrap.
        seed: Of the resampling.
    """
    units = _units(rows)
    subsets = [row["subset"] for row in rows]
    outcomes = [row["outcome"][name] for row in rows]
    names = list(benchmark.summarize(subsets, outcomes))

    def statistic(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        chosen = [i for unit in drawn for i in units[unit]]
        summary = benchmark.summarize([subsets[i] for i in chosen], [outcomes[i] for i in chosen])
        return np.array([summary[name] for name in names])

    # Units of one subset and size are alike, so that nothing that the aggregation needs is missing from a resample.
    strata = [(subsets[unit[0]], len(unit)) for unit in units]
    values, low, high = bootstrap(statistic, len(units), strata=strata, num_resamples=num_resamples, seed=seed)
    return {
        each: {"value": float(values[i]), "low": float(low[i]), "high": float(high[i])} for i, each in enumerate(names)
    }


def _units(rows: Sequence[ItemRow]) -> list[list[int]]:
    """Return the rows that are drawn together."""
    units: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        units.setdefault((row["subset"], row["group"]) if row["group"] else i, []).append(i)
    return list(units.values())


def _calibration(rows: Sequence[ItemRow], name: str) -> dict[str, Any]:
    """Return what the logistic function of a pair's margin is worth as the probability of its preference."""
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
