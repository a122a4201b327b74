"""Items of a benchmark, scored batch by batch into a file, one row per item."""

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
    """The scores of one item, and their outcomes.

    Attributes:
        place: The row of the source.
        id: The row's own id, or its number.
        subset: Subset of the benchmark.
        group: Items of one subset and group belong together; ``""`` for a single item.
        preference: One value per completion, larger is preferred.
        num_tokens: Tokens of each completion, including the stop token.
        scores: By scorer, one value per completion; larger is better.
        outcome: By scorer, the benchmark's verdict on the scores.
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
    """Score items in order, and return the rows of all; the caller finishes the output.

    Batches are the same as in a call that was never stopped, as in :func:`falign.evaluation.score_file.score_trees`.

    Args:
        items: The items, read one at a time.
        scorer: Scores them.
        benchmark: Derives outcomes from scores.
        output: Receives the rows, and has those of an earlier call.
        tokens_per_batch: Maximum number of tokens scored at once; a larger item is scored alone.
        on_batch: Called after each batch with the number of items so far, and how many of them an earlier call had
            scored.

    Raises:
        ConfigError: The output has rows of another source.
        DataError: There is no item.
        ModelError: A value is NaN or infinite.
    """
    rows: list[ItemRow] = []
    resumed = 0
    for batch in batches_in_order(items, max_tokens=tokens_per_batch):
        taken = [output.take_rows([_identity(item)], form=ItemRow) for item in batch]
        finished: list[Any] = [rows[0] for rows in taken if rows is not None]
        new: list[ItemRow] = []
        if len(finished) < len(batch):
            scores = scorer.score(batch)
            new = [
                _row(item, benchmark, values) for item, values in list(zip(batch, scores, strict=True))[len(finished) :]
            ]
            output.append(new)
        resumed += len(finished)
        rows += [*finished, *new]
        if on_batch is not None:
            on_batch(len(rows), resumed)
    if not rows:
        raise DataError("No item is left to score: see the counts of skipped items; fix them, or raise max_length.")
    return rows


def _identity(item: ItemTree) -> dict[str, Any]:
    """Return the fields of a row that are known before scoring."""
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
