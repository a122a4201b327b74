"""RewardBench: pairs in 23 subsets and four sections, and the prior sets beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from falign.data import BadRows, Row, RowReader
from falign.errors import ConfigError
from falign.evaluation.benchmarks.base import BenchmarkItem, by_subset, larger, mean, mean_of_all, subset_means
from falign.evaluation.benchmarks.schema import PAIR_COLUMNS, identifier, items_of, prompt_of, read_published, string

__all__ = ["RewardBench"]

# The weight of math-prm, whose 447 examples are raised to those of the six code subsets, is the leaderboard's.
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
"""Section to its subsets and their weights, by number of examples."""

PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
PRIOR_SETS_NAME = "Prior Sets"
PRIOR_SETS_WEIGHT = 0.5
PRIOR_SETS_HUB_NAME = "allenai/preference-test-sets"


class RewardBench:
    """Accuracy on pairs of completions; a tie counts as wrong, as on the leaderboard.

    A section is the mean of its subsets, weighted with the published numbers of examples; the score is the plain mean
    of the four sections. If the four prior sets are present, their plain mean is a fifth section, and
    ``score_with_prior_sets`` gives it half the weight of the others.

    Source:
        Lambert et al., RewardBench (arXiv:2403.13787), section 4.2; weights of allenai/reward-bench.
    """

    name = "rewardbench"
    hub_name: str | None = "allenai/reward-bench"
    splits = ("filtered", "raw", *PRIOR_SETS)
    subsets = tuple(subset for section in SECTIONS.values() for subset in section)

    def read(self, path: str | None = None, *, split: str | None = None, bad_rows: BadRows) -> Iterator[BenchmarkItem]:
        """Yield the items; splits named after a prior set come from a Hub dataset of their own."""
        split = split or self.splits[0]
        if path is None and split not in self.splits:
            raise ConfigError(f"split={split!r} is unknown; {self.name} has {list(self.splits)}.")
        prior = split in PRIOR_SETS
        source = path or (PRIOR_SETS_HUB_NAME if prior else str(self.hub_name))
        columns = PAIR_COLUMNS if prior else None
        rows = read_published(self.name, source, split=split, bad_rows=bad_rows, columns=columns)
        item = partial(_prior_item, subset=split) if prior else _item
        yield from items_of(rows, item, source=source, bad_rows=bad_rows)

    def outcome(self, item: BenchmarkItem, scores: Sequence[float]) -> dict[str, float]:
        """Return ``correct``."""
        chosen, rejected = scores
        return {"correct": larger(chosen, rejected, tie=0.0)}

    def summarize(self, subsets: Sequence[str], outcomes: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return the score, the sections, the subsets and the plain accuracy."""
        means = subset_means(by_subset(subsets, outcomes, (*self.subsets, *PRIOR_SETS)))
        sections = {
            section: sum(means[subset] * weight for subset, weight in weights.items()) / sum(weights.values())
            for section, weights in SECTIONS.items()
            if means.keys() >= weights.keys()
        }
        summary: dict[str, float] = {}
        score = mean_of_all(sections, list(SECTIONS))
        prior = mean_of_all(means, PRIOR_SETS)
        if score is not None:
            summary["score"] = score
        if score is not None and prior is not None:
            total = len(SECTIONS) + PRIOR_SETS_WEIGHT
            summary["score_with_prior_sets"] = (len(SECTIONS) * score + PRIOR_SETS_WEIGHT * prior) / total
        summary |= sections
        if prior is not None:
            summary[PRIOR_SETS_NAME] = prior
        return summary | means | {"accuracy": mean(outcome["correct"] for outcome in outcomes)}


def _item(row: Row) -> BenchmarkItem:
    return BenchmarkItem(
        place=row.place,
        id=identifier(row, "id"),
        subset=string(row, "subset"),
        prompt=prompt_of(row),
        completions=(string(row, "chosen"), string(row, "rejected")),
        preference=(1.0, 0.0),
    )


def _prior_item(row: Row, subset: str) -> BenchmarkItem:
    # Where the sides are conversations they repeat the prompt, of which the column has the first turn alone.
    whole = not isinstance(row.fields["chosen"], str)
    names = ("chosen", "rejected") if whole else ("prompt", "chosen", "rejected")
    example = RowReader("implicit" if whole else "preference").read(
        Row(row.place, {name: row.fields[name] for name in names})
    )
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in example.completions]
    return BenchmarkItem(row.place, identifier(row, "id"), subset, example.prompt, tuple(texts), (1.0, 0.0))
