"""The protocol of a reward benchmark: items to score, the result of one item, and the summary of all items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from falign.data import BadRows, Text

__all__ = ["Benchmark", "BenchmarkItem", "missing_subsets"]


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

    def summarise(self, subsets: Sequence[str], outcomes: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return the published aggregation, as fractions of 1.

        Args:
            subsets: Of each item.
            outcomes: Of each item, in the same order; an item that is drawn twice occurs twice.

        Returns:
            ``score`` first, the published figure; it and each section are left out where one of their subsets is
            missing. Then sections and subsets, and ``accuracy``, the plain mean of ``correct``, which is always there.
        """
        ...


def missing_subsets(benchmark: Benchmark, subsets: Sequence[str]) -> tuple[str, ...]:
    """Return the published subsets of which no item is there, so that what they belong to has no score.

    Args:
        benchmark: Whose subsets.
        subsets: Of the items that are there.
    """
    there = set(subsets)
    return tuple(subset for subset in benchmark.subsets if subset not in there)
