"""The protocol of a reward benchmark (items, the outcome of one, the summary of all), and means of outcomes."""

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
    """One prompt and the completions that a reward is asked to tell apart.

    Attributes:
        place: The row it came from, for messages.
        id: The row's own id where it has one, unique within its subset; the row's number otherwise.
        subset: The part of the benchmark that it belongs to; ``""`` where there is one part only.
        prompt: Plain text, or the turns before the answer.
        completions: The texts to score.
        preference: One value per completion, larger is preferred; equal values are of equal worth.
        group: Items of one subset and group are scored together, so that an interval resamples them together; ``""``
            for an item that stands alone.
        plain: Whether a plain prompt is continued as it is, like a file's plain pairs in training; otherwise it is a
            user's turn and the completions are the assistant's. None: nobody has said so, and it is refused where the
            policy has a chat template.
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
        """The name that falign knows it by."""
        ...

    @property
    def hub_name(self) -> str | None:
        """Its data set on the Hub; None where it has none."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the Hub's data set, the one that is read by default first."""
        ...

    @property
    def subsets(self) -> tuple[str, ...]:
        """All subsets that its published score is made of; empty where any will do."""
        ...

    def read(self, path: str | None = None, *, split: str | None = None, bad_rows: BadRows) -> Iterator[BenchmarkItem]:
        """Yield the items in their order.

        Args:
            path: A file or folder in the published schema; None reads the Hub's data set.
            split: One of ``splits``, or of the folder's; None takes the first.
            bad_rows: Takes the rows that cannot be used.

        Raises:
            DataError: The source cannot be read, its rows have another schema, or a row cannot be used.
        """
        ...

    def outcome(self, item: BenchmarkItem, scores: Sequence[float]) -> dict[str, float]:
        """Return what one item's scores say, ``correct`` first: 1, 0, or between for a tie or several comparisons.

        Args:
            item: As read.
            scores: One per completion, larger is better.
        """
        ...

    def summarize(self, subsets: Sequence[str], outcomes: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return the published aggregation, as fractions of 1.

        Args:
            subsets: Of each item.
            outcomes: Of each item, in the same order; an item that is drawn twice occurs twice.

        Returns:
            ``score`` first, the published figure; it and each section are left out where one of their subsets is
            missing. Then sections and subsets, and ``accuracy``, the plain mean of ``correct``, which is always there.
        """
        ...


@runtime_checkable
class OwnTexts(Protocol):
    """A benchmark of the user's own texts: plain ones are continued as they are or rendered as turns, as the user says.

    Attributes:
        chat: As :attr:`falign.data.DataSource.chat`.
    """

    @property
    def chat(self) -> bool | None: ...

    def with_chat(self, chat: bool | None) -> Benchmark:
        """Return the benchmark that reads plain texts as ``chat`` says."""
        ...


def missing_subsets(benchmark: Benchmark, subsets: Sequence[str]) -> tuple[str, ...]:
    """Return the published subsets of which no item is there, so that what they belong to has no score.

    Args:
        benchmark: Whose subsets.
        subsets: Of the items that are there.
    """
    there = set(subsets)
    return tuple(subset for subset in benchmark.subsets if subset not in there)


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
