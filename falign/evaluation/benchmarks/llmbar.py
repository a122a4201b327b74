"""LLMBar: pairs of outputs, of which one follows the instruction and the other may look better."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from falign.choices import shown
from falign.data import BadRows, Row
from falign.errors import DataError
from falign.evaluation.benchmarks.base import BenchmarkItem, by_subset, larger, mean, mean_of_all, subset_means
from falign.evaluation.benchmarks.schema import identifier, items_of, prompt_of, read_published, string

__all__ = ["LLMBar"]

NATURAL = "Natural"
ADVERSARIAL = ("Neighbor", "GPTInst", "GPTOut", "Manual")
ADVERSARIAL_NAME = "Adversarial"
PREFERENCES = {1: (1.0, 0.0), 2: (0.0, 1.0)}
_FOLDER_FILE = "dataset.json"
_PREFIX = re.compile(rf"{ADVERSARIAL_NAME}[_/]")


class LLMBar:
    """Accuracy on pairs of outputs; a tie counts half.

    ``Adversarial`` is the plain mean of the four adversarial subsets, and the score the plain mean of all five subsets.

    Source:
        Zeng et al., LLMBar (arXiv:2310.07641), section 4; princeton-nlp/LLMBar.
    """

    name = "llmbar"
    hub_name: str | None = None  # its dataset there is a script, which `datasets` does not run
    splits: tuple[str, ...] = ()
    subsets = (NATURAL, *ADVERSARIAL)

    def read(self, path: str | None = None, *, split: str | None = None, bad_rows: BadRows) -> Iterator[BenchmarkItem]:
        """Yield the items of a file, or of the folder ``Dataset/LLMBar`` of its repository.

        The subset is in the column ``subset``, or it is the name of the folder of a file ``dataset.json``.
        """
        if path is None:
            raise DataError(
                "llmbar: its Hub dataset is a script, which `datasets` does not run; give a file, or the folder "
                "Dataset/LLMBar of github.com/princeton-nlp/LLMBar."
            )
        for source in _sources(path):
            parent = Path(source).resolve().parent.name
            subset = parent if Path(source).name == _FOLDER_FILE and parent in self.subsets else ""
            rows = read_published(self.name, source, split=split or "test", bad_rows=bad_rows)
            yield from items_of(rows, lambda row, subset=subset: _item(row, subset), source=source, bad_rows=bad_rows)

    def outcome(self, item: BenchmarkItem, scores: Sequence[float]) -> dict[str, float]:
        """Return ``correct``."""
        right = item.preference.index(1.0)
        return {"correct": larger(scores[right], scores[1 - right], tie=0.5)}

    def summarize(self, subsets: Sequence[str], outcomes: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return the score, the adversarial mean, the subsets and the plain accuracy."""
        means = subset_means(by_subset(subsets, outcomes, self.subsets))
        means.pop("", None)  # rows without a subset count only in the accuracy
        found = {"score": mean_of_all(means, self.subsets), ADVERSARIAL_NAME: mean_of_all(means, ADVERSARIAL)}
        summary = {key: value for key, value in found.items() if value is not None}
        return summary | means | {"accuracy": mean(outcome["correct"] for outcome in outcomes)}


def _sources(path: str) -> list[str]:
    files = sorted(str(file) for file in Path(path).rglob(_FOLDER_FILE)) if Path(path).is_dir() else []
    return files or [path]


def _item(row: Row, subset: str) -> BenchmarkItem:
    label = row.fields["label"]
    label = {"1": 1, "2": 2}.get(label) if isinstance(label, str) else label  # CSV has no other type
    if isinstance(label, bool) or not isinstance(label, int) or label not in PREFERENCES:
        raise DataError(
            f"{row.place}: 'label' is {shown(row.fields['label'])}; it must be 1 or 2, the better output: "
            "fix the row or remove it."
        )
    return BenchmarkItem(
        place=row.place,
        id=identifier(row, "index"),
        subset=_PREFIX.sub("", string(row, "subset")) if "subset" in row.fields else subset,
        prompt=prompt_of(row, "input"),
        completions=(string(row, "output_1"), string(row, "output_2")),
        preference=PREFERENCES[label],
    )
