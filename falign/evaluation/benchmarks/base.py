"""The interface of a reward benchmark: its items, the outcome of each, the summary of all; and means of outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from falign.data import BadRows, Text

__all__ = [
    "Benchmark",
    "BenchmarkItem",
    "OwnTexts",
    "by_subset",
    "larger",
    "mean",
    "mean_of_all",
    "means_of_keys",
    "missing_subsets",
    "subset_means",
]


@dataclass(frozen=True)
class BenchmarkItem:
    """One prompt with the completions that a reward must rank.

    Attributes:
        place: The row of the source, for messages.
        id: The row's own id if it has one, unique within its subset; otherwise the row's number.
        subset: The subset of the benchmark; ``""`` if it has no subsets.
        prompt: Plain text, or the turns before the answer.
        completions: The texts to score.
        preference: One value per completion, larger is preferred; equal values are equally good.
        group: Items of one subset and group contribute to one figure, so intervals resample them together; ``""`` for a
            single item.
        plain: True if a plain prompt is continued as it is, as plain pairs are in training; False if it is a user's
            turn and the completions are the assistant's. None if nothing says which: then it is refused if the policy
            has a chat template.
    """

    place: str
    id: str
    subset: str
    prompt: Text
    completions: tuple[str, ...]
    preference: tuple[float, ...]
    group: str = ""
    plain: bool | None = False


@runtime_checkable
class Benchmark(Protocol):
    """A reward benchmark, as it was published."""

    @property
    def name(self) -> str:
        """Its name in falign."""
        ...

    @property
    def hub_name(self) -> str | None:
        """Its dataset on the Hub; None if it has none."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the Hub's dataset; the first is the default."""
        ...

    @property
    def subsets(self) -> tuple[str, ...]:
        """The subsets that its published score needs; empty if it needs no particular ones."""
        ...

    def read(self, path: str | None = None, *, split: str | None = None, bad_rows: BadRows) -> Iterator[BenchmarkItem]:
        """Yield the items in order.

        Args:
            path: A file or folder in the published schema; None reads the Hub's dataset.
            split: One of ``splits``, or a split of the folder; None for the first.
            bad_rows: Collects unusable rows.

        Raises:
            DataError: The source cannot be read, its rows have another schema, or a row is unusable.
        """
        ...

    def outcome(self, item: BenchmarkItem, scores: Sequence[float]) -> dict[str, float]:
        """Return the verdict on the scores of one item, ``correct`` first: 1, 0, or between for ties or several pairs.

        Args:
            item: The item.
            scores: One per completion, larger is better.
        """
        ...

    def summarize(self, subsets: Sequence[str], outcomes: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return the published aggregation, as fractions of 1.

        Args:
            subsets: The subset of each item.
            outcomes: The outcome of each item, in the same order; a bootstrap resample may repeat items.

        Returns:
            ``score`` first, the published figure, then sections and subsets; the score and a section are left out if
            one of their subsets is missing. Last ``accuracy``, the plain mean of ``correct``, which is always present.
        """
        ...


@runtime_checkable
class OwnTexts(Protocol):
    """A benchmark of the user's own texts, for which the user decides whether plain texts are turns.

    Attributes:
        chat: See :attr:`falign.data.DataSource.chat`.
    """

    @property
    def chat(self) -> bool | None: ...

    def with_chat(self, chat: bool | None) -> Benchmark:
        """Return the benchmark with another ``chat``."""
        ...


def missing_subsets(benchmark: Benchmark, subsets: Sequence[str]) -> tuple[str, ...]:
    """Return the published subsets without any item; figures that need them are left out.

    Args:
        benchmark: The benchmark.
        subsets: The subset of each item.
    """
    present = set(subsets)
    return tuple(subset for subset in benchmark.subsets if subset not in present)


def larger(first: float, second: float, *, tie: float) -> float:
    """Return 1 if the first score is larger, 0 if the second is, and ``tie`` if they are equal.

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
    """Return the outcomes of each subset: the subsets of ``order`` first, then the others as they occur."""
    present = set(subsets)
    groups: dict[str, list[dict[str, float]]] = {subset: [] for subset in order if subset in present}
    for subset, outcome in zip(subsets, outcomes, strict=True):
        groups.setdefault(subset, []).append(outcome)
    return groups


def subset_means(groups: Mapping[str, Sequence[dict[str, float]]]) -> dict[str, float]:
    """Return the mean of ``correct`` of each subset."""
    return {subset: mean(outcome["correct"] for outcome in group) for subset, group in groups.items()}


def mean_of_all(values: Mapping[str, float], names: Sequence[str]) -> float | None:
    """Return the plain mean of named values; None if one of them is missing."""
    return mean(values[name] for name in names) if all(name in values for name in names) else None
