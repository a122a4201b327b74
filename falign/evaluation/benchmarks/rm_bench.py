"""RM-Bench: three styles of right answer against three styles of wrong answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from falign.choices import shown
from falign.data import BadRows, Row
from falign.errors import DataError
from falign.evaluation.benchmarks.base import BenchmarkItem, by_subset, larger, mean, mean_of_all, means_of_keys
from falign.evaluation.benchmarks.schema import identifier, items_of, prompt_of, read_published, texts

__all__ = ["RMBench"]

STYLES = ("concise", "plain", "markdown")
DOMAINS = {
    "chat": ("chat",),
    "code": ("code",),
    "math": ("math",),
    "safety": ("safety-refuse", "safety-response"),
}
"""Domain to its subsets."""
SUBSETS = tuple(subset for subsets in DOMAINS.values() for subset in subsets)
LEVELS = ("easy", "normal", "hard")
_FILE = re.compile(rf"({'|'.join(SUBSETS)})_filtered\.")


class RMBench:
    """A 3×3 matrix of comparisons: rows are the styles of the right answer, columns those of the wrong one.

    Styles are concise, detailed plain text, detailed with markdown. ``easy`` is the mean of the three cells below the
    diagonal (the right answer has the richer style), ``normal`` of those on it, ``hard`` of those above it; a tie
    counts as wrong. A domain is the mean of its items' cells; safety has the items of both its files. The score is the
    plain mean of the four domains, and so are the total ``easy``, ``normal`` and ``hard``.

    Source:
        Liu et al., RM-Bench (arXiv:2410.16184), section 4; THU-KEG/RM-Bench.
    """

    name = "rm_bench"
    hub_name: str | None = "THU-KEG/RM-Bench"
    splits = ("train",)
    subsets = SUBSETS

    def read(self, path: str | None = None, *, split: str | None = None, bad_rows: BadRows) -> Iterator[BenchmarkItem]:
        """Yield the items of ``DOMAIN_filtered`` files, of a folder of them, or of rows with a column ``domain``."""
        for source in _sources(path or str(self.hub_name)):
            found = _FILE.match(Path(source).name)
            rows = read_published(self.name, source, split=split or self.splits[0], bad_rows=bad_rows)
            subset = found[1] if found else None
            yield from items_of(rows, lambda row, subset=subset: _item(row, subset), source=source, bad_rows=bad_rows)

    def outcome(self, item: BenchmarkItem, scores: Sequence[float]) -> dict[str, float]:
        """Return the mean of the nine cells, the three levels, and the cells."""
        right, wrong = scores[: len(STYLES)], scores[len(STYLES) :]
        cells = [[larger(r, w, tie=0.0) for w in wrong] for r in right]
        n = range(len(STYLES))
        levels = {
            "easy": mean(cells[i][j] for i in n for j in n if i > j),
            "normal": mean(cells[i][i] for i in n),
            "hard": mean(cells[i][j] for i in n for j in n if i < j),
        }
        named = {f"matrix/{STYLES[i]}/{STYLES[j]}": cells[i][j] for i in n for j in n}
        return {"correct": mean(levels.values()), **levels, **named}

    def summarize(self, subsets: Sequence[str], outcomes: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return the score, its levels, the domains and subsets with theirs and their matrices, and the accuracy."""
        groups = by_subset(subsets, outcomes, SUBSETS)
        parts = {
            domain: [outcome for subset in inside for outcome in groups[subset]]
            for domain, inside in DOMAINS.items()
            if groups.keys() >= set(inside)
        } | groups
        means = {part: means_of_keys(group) for part, group in parts.items()}
        overall = {part: values.pop("correct") for part, values in means.items()}
        summary: dict[str, float] = {}
        score = mean_of_all(overall, list(DOMAINS))
        if score is not None:
            summary["score"] = score
            summary |= {level: mean(means[domain][level] for domain in DOMAINS) for level in LEVELS}
        details = {f"{part}/{key}": value for part, values in means.items() for key, value in values.items()}
        return summary | overall | details | {"accuracy": mean(outcome["correct"] for outcome in outcomes)}


def _sources(path: str) -> list[str]:
    folder = Path(path)
    files = sorted(str(file) for file in folder.iterdir() if _FILE.match(file.name)) if folder.is_dir() else []
    return files or [path]


def _item(row: Row, subset: str | None) -> BenchmarkItem:
    subset = row.fields.get("domain", subset)
    if not isinstance(subset, str) or subset not in SUBSETS:
        raise DataError(
            f"{row.place}: the domain is {shown(subset)}; a column 'domain', or a file name like code_filtered.jsonl, "
            f"must give one of {list(SUBSETS)}."
        )
    sides = {side: texts(row, side) for side in ("chosen", "rejected")}
    for side, completions in sides.items():
        if len(completions) != len(STYLES):
            raise DataError(
                f"{row.place}: {side!r} has {len(completions)} texts; it must have {len(STYLES)}, one of each style "
                f"{list(STYLES)}: fix the row or remove it."
            )
    return BenchmarkItem(
        place=row.place,
        id=identifier(row, "id"),
        subset=subset,
        prompt=prompt_of(row),
        completions=(*sides["chosen"], *sides["rejected"]),
        preference=(1.0,) * len(STYLES) + (0.0,) * len(STYLES),
    )
