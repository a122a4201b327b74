"""A benchmark from the user's own preference data: any pairs or lists that training reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from falign.data import BadRows, DataSource, Example, Row, RowReader, read_rows
from falign.data.conversations import TOOL_CALLS
from falign.errors import DataError
from falign.evaluation.benchmarks.base import Benchmark, BenchmarkItem, mean
from falign.evaluation.benchmarks.schema import identifier, items_of
from falign.objectives import pairs_of
from falign.objectives.groups import accuracies

__all__ = ["Preferences"]


@dataclass(frozen=True)
class Preferences:
    """Accuracy on preference rows: the preferred of two completions has the larger score, for all pairs in a row.

    The score is ``rewards/accuracies`` of training: the mean over all pairs, where a tie, up to rounding, counts half.
    ``best`` is the share of rows in which one of the most preferred completions has the largest score.

    Attributes:
        format: See :attr:`falign.data.DataSource.format`.
        columns: See :attr:`falign.data.DataSource.columns`.
        chat: See :attr:`falign.data.DataSource.chat`.
    """

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    chat: bool | None = None

    @property
    def name(self) -> str:
        """``"preferences"``."""
        return "preferences"

    @property
    def hub_name(self) -> str | None:
        """None: the path may be that of any dataset on the Hub."""
        return None

    @property
    def splits(self) -> tuple[str, ...]:
        """Empty: any split of the given dataset; ``"train"`` by default, as in training."""
        return ()

    @property
    def subsets(self) -> tuple[str, ...]:
        """Empty: none are published."""
        return ()

    def with_chat(self, chat: bool | None) -> Benchmark:
        """Return the benchmark with another ``chat``."""
        return replace(self, chat=chat)

    def read(self, path: str | None = None, *, split: str | None = None, bad_rows: BadRows) -> Iterator[BenchmarkItem]:
        """Yield the items; plain texts are left plain unless ``chat`` is true."""
        if path is None:
            raise DataError("preferences: the source is missing; name a file, a folder or a dataset on the Hub.")
        source = DataSource(path, split or "train", self.format, self.columns, self.chat)
        reader = RowReader.of(source)
        rows = read_rows(source.path, split=source.split, bad_rows=bad_rows)
        yield from items_of(rows, lambda row: _item(row, reader.read(row), self.chat), source=path, bad_rows=bad_rows)

    def outcome(self, item: BenchmarkItem, scores: Sequence[float]) -> dict[str, float]:
        """Return ``correct``, the share of right pairs, their number ``pairs``, and ``best``."""
        preference, values = (torch.tensor(list(x), dtype=torch.float64) for x in (item.preference, scores))
        chosen, rejected = pairs_of(preference, torch.zeros(len(preference), dtype=torch.long))
        size = torch.maximum(values[chosen].abs(), values[rejected].abs())
        right = accuracies(values[chosen] - values[rejected], size)
        top = values == values.max()
        best = (preference[top] == preference.max()).double().mean()
        return {"correct": right.mean().item(), "pairs": float(len(chosen)), "best": best.item()}

    def summarize(self, subsets: Sequence[str], outcomes: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return the score, ``best``, and the mean of the rows' own accuracies."""
        pairs = sum(outcome["pairs"] for outcome in outcomes)
        return {
            "score": sum(outcome["correct"] * outcome["pairs"] for outcome in outcomes) / pairs,
            "best": mean(outcome["best"] for outcome in outcomes),
            "accuracy": mean(outcome["correct"] for outcome in outcomes),
        }


def _item(row: Row, example: Example, chat: bool | None) -> BenchmarkItem:
    if example.preference is None or len(example.completions) < 2:
        raise DataError(
            f"{row.place}: the row has {len(example.completions)} completion and no other to compare it with: give "
            "pairs or lists."
        )
    if example.left_out is not None:
        raise DataError(f"{row.place}: {example.left_out}, so that there is no pair to count.")
    if any(len(each) > 1 or TOOL_CALLS in each[0] for each in example.completions if not isinstance(each, str)):
        raise DataError(
            f"{row.place}: an answer has several turns or calls tools, and those of a benchmark are texts; leave the "
            "row out."
        )
    return BenchmarkItem(
        place=row.place,
        id=identifier(row, "id"),
        subset="",
        prompt=example.prompt,
        completions=tuple(text if isinstance(text, str) else text[-1]["content"] for text in example.completions),
        preference=example.preference,
        plain=None if chat is None and not example.conversational else not example.conversational,
    )
