"""A stream of items scored into a file, one row per item."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from typing_extensions import TypedDict

from falign.errors import DataError
from falign.evaluation.benchmarks import Benchmark
from falign.evaluation.item_scorer import ItemScorer
from falign.evaluation.item_stream import ItemTree
from falign.evaluation.score_file import batches_in_order
from falign.evaluation.score_output import ScoreOutput

__all__ = ["ItemRow", "score_items"]


class ItemRow(TypedDict):
    """The scores of one item, and what they say.

    Attributes:
        place: The row of the source.
        id: The row's own id, or its number.
        subset: The part of the benchmark.
        group: Items of one subset and group belong together; ``""`` for one that stands alone.
        preference: One value per completion, larger is preferred.
        num_tokens: Of each completion, its stop token included.
        scores: One value per completion under each scorer; larger is better.
        outcome: What the benchmark makes of them, under each scorer.
    """

    place: str
    id: str
    subset: str
    group: str
    preference: list[float]
    num_tokens: list[int]
    scores: dict[str, list[float]]
    outcome: dict[str, dict[str, float]]


def score_items(
    items: Iterable[ItemTree],
    scorer: ItemScorer,
    benchmark: Benchmark,
    output: ScoreOutput,
    *,
    tokens_per_batch: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[ItemRow]:
    """Score items in their order, and return the rows of all; the output gets its name from the caller.

    Batches are those of an evaluation that was never stopped: where one was left half written it is scored again as a
    whole, and what was missing of it is written.

    Args:
        items: Read as they are needed.
        scorer: What scores them.
        benchmark: What makes outcomes of scores.
        output: Where rows go, and where those of an earlier call are.
        tokens_per_batch: Most tokens that are scored at once, a larger item excepted.
        on_batch: Called after each batch with the items so far, and how many of them an earlier call had scored.

    Raises:
        ConfigError: The source is not the one of the rows that are there.
        DataError: There is no item.
        ModelError: A value is not finite.
    """
    rows: list[ItemRow] = []
    resumed = 0
    for batch in batches_in_order(items, max_tokens=tokens_per_batch):
        taken = [output.take_rows([_identity(item)], form=ItemRow) for item in batch]
        there: list[Any] = [rows[0] for rows in taken if rows is not None]
        new: list[ItemRow] = []
        if len(there) < len(batch):
            scores = scorer.score(batch)
            new = [
                _row(item, benchmark, values) for item, values in list(zip(batch, scores, strict=True))[len(there) :]
            ]
            output.append(new)
        resumed += len(there)
        rows += [*there, *new]
        if on_batch is not None:
            on_batch(len(rows), resumed)
    if not rows:
        raise DataError("No item was left to score: see what became of them, and raise max_length, or fix the rows.")
    return rows


def _identity(item: ItemTree) -> dict[str, Any]:
    """Return the fields that the rows of an item have under every scorer."""
    return {
        "place": item.item.place,
        "id": item.item.id,
        "subset": item.item.subset,
        "group": item.item.group,
        "preference": list(item.item.preference),
        "num_tokens": [len(ids) for ids in item.tree.completion_ids],
    }


def _row(item: ItemTree, benchmark: Benchmark, scores: dict[str, list[float]]) -> ItemRow:
    outcome = {name: benchmark.outcome(item.item, values) for name, values in scores.items()}
    row: Any = {**_identity(item), "scores": scores, "outcome": outcome}
    return row
