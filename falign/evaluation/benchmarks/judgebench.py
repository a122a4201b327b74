"""JudgeBench: pairs of answers to hard questions, of which exactly one is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from falign.choices import shown
from falign.data import BadRows, Row
from falign.errors import ConfigError, DataError
from falign.evaluation.benchmarks.base import BenchmarkItem, by_subset, larger, mean, subset_means
from falign.evaluation.benchmarks.schema import identifier, items_of, prompt_of, read_published, string

__all__ = ["JudgeBench"]

CATEGORIES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
"""Category by the beginning of a row's ``source``."""

PREFERENCES = {"A>B": (1.0, 0.0), "B>A": (0.0, 1.0)}


class JudgeBench:
    """Accuracy on pairs of answers.

    The published protocol asks a judge twice, in both orders. A score does not depend on the order, so one comparison
    gives the published figure, and a tie counts half. ``score`` is the mean over all pairs of one split.

    Source:
        Tan et al., JudgeBench (arXiv:2410.12784), section 4; ScalerLab/JudgeBench.
    """

    name = "judgebench"
    hub_name: str | None = "ScalerLab/JudgeBench"
    splits = ("gpt", "claude")
    subsets = tuple(CATEGORIES.values())

    def read(self, path: str | None = None, *, split: str | None = None, bad_rows: BadRows) -> Iterator[BenchmarkItem]:
        """Yield the items of one split, ``gpt`` or ``claude``, named after the model that wrote the answers."""
        split = split or self.splits[0]
        if path is None and split not in self.splits:
            raise ConfigError(f"split={split!r} is unknown; {self.name} has {list(self.splits)}.")
        source = path or str(self.hub_name)
        rows = read_published(self.name, source, split=split, bad_rows=bad_rows)
        yield from items_of(rows, _item, source=source, bad_rows=bad_rows)

    def outcome(self, item: BenchmarkItem, scores: Sequence[float]) -> dict[str, float]:
        """Return ``correct``."""
        right = item.preference.index(1.0)
        return {"correct": larger(scores[right], scores[1 - right], tie=0.5)}

    def summarize(self, subsets: Sequence[str], outcomes: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return the score, the categories and the plain accuracy."""
        means = subset_means(by_subset(subsets, outcomes, self.subsets))
        accuracy = mean(outcome["correct"] for outcome in outcomes)
        summary = {"score": accuracy} if means.keys() >= set(self.subsets) else {}
        return summary | means | {"accuracy": accuracy}


def _item(row: Row) -> BenchmarkItem:
    source, label = string(row, "source"), row.fields["label"]
    if not isinstance(label, str) or label not in PREFERENCES:
        raise DataError(f"{row.place}: 'label' is {shown(label)}; it must be one of {list(PREFERENCES)}: fix the row.")
    return BenchmarkItem(
        place=row.place,
        id=identifier(row, "pair_id"),
        subset=next((category for start, category in CATEGORIES.items() if source.startswith(start)), source),
        prompt=prompt_of(row, "question"),
        completions=(string(row, "response_A"), string(row, "response_B")),
        preference=PREFERENCES[label],
    )
