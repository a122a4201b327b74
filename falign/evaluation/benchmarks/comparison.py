"""Outcomes of comparing scores, and their means over the parts of a benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

__all__ = ["by_subset", "larger", "mean", "mean_of_all", "means_of_keys", "subset_means"]


def larger(first: float, second: float, *, tie: float) -> float:
    """Return 1 where the first score is larger, 0 where the second is, and ``tie`` where they are equal.

    Example:
        >>> larger(2.0, 1.0, tie=0.5), larger(1.0, 1.0, tie=0.5), larger(0.0, 1.0, tie=0.5)
        (1.0, 0.5, 0.0)
    """
    return tie if first == second else float(first > second)


def mean(values: Iterable[float]) -> float:
    """Return the mean of at least one value."""
    values = list(values)
    return sum(values) / len(values)


def means_of_keys(outcomes: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of every key of at least one outcome; all have the keys of the first.

    Example:
        >>> means_of_keys([{"easy": 1.0, "hard": 0.0}, {"hard": 1.0, "easy": 1.0}])
        {'easy': 1.0, 'hard': 0.5}
    """
    keys = list(outcomes[0])
    columns = zip(*([outcome[key] for key in keys] for outcome in outcomes), strict=True)
    return {key: mean(column) for key, column in zip(keys, columns, strict=True)}


def by_subset(
    subsets: Sequence[str], outcomes: Sequence[dict[str, float]], order: Sequence[str] = ()
) -> dict[str, list[dict[str, float]]]:
    """Return the outcomes of each subset: those of ``order`` first, then the others as they occur."""
    there = set(subsets)
    groups: dict[str, list[dict[str, float]]] = {subset: [] for subset in order if subset in there}
    for subset, outcome in zip(subsets, outcomes, strict=True):
        groups.setdefault(subset, []).append(outcome)
    return groups


def subset_means(groups: Mapping[str, Sequence[dict[str, float]]]) -> dict[str, float]:
    """Return the mean of ``correct`` of each subset."""
    return {subset: mean(outcome["correct"] for outcome in group) for subset, group in groups.items()}


def mean_of_all(values: Mapping[str, float], names: Sequence[str]) -> float | None:
    """Return the plain mean of named values; None where one of them is missing."""
    return mean(values[name] for name in names) if all(name in values for name in names) else None
