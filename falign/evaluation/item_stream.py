"""The items of a benchmark as prompt trees, tokenized like training data, and counts of items left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from falign.choices import nearest, require_choice
from falign.data import BadRows, Example, Window, encode
from falign.data.chat_template import Tokenizer
from falign.data.rendering import require_chat_choice
from falign.data.windows import fit
from falign.errors import DataError
from falign.evaluation.benchmarks import Benchmark, BenchmarkItem
from falign.evaluation.score_file import counts_message
from falign.scoring import PromptTree

__all__ = ["ItemStream", "ItemTree", "LongItems", "read_items"]

LongItems = Literal["skip", "cut", "error"]


class ItemTree(NamedTuple):
    """An item as text, and as token ids."""

    item: BenchmarkItem
    tree: PromptTree

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all completions."""
        return self.tree.num_tokens


class ItemStream:
    """The items that can be scored, each tokenized when it is read, and counts of those that cannot.

    A plain prompt is a user's turn, unless the item is plain or the tokenizer has no chat template.

    Args:
        items: Items of a benchmark, see :func:`read_items`.
        tokenizer: The policy's tokenizer.
        stop_token_ids: All tokens at which the model's generation ends.
        window: Maximum number of tokens of a prompt with its longest completion; for ``cut`` also how to cut.
        long_items: Items longer than the window are left out and counted, cut as in training, or an error.
        bad_rows: Collects items that cannot be scored: an empty completion, a stop token inside one.
        limit: Maximum number of items that can be scored.

    Attributes:
        bad_rows: Counts unusable items, including rows that the benchmark could not read.
    """

    def __init__(
        self,
        items: Iterable[BenchmarkItem],
        tokenizer: Tokenizer,
        *,
        stop_token_ids: Collection[int],
        window: Window,
        long_items: LongItems = "skip",
        bad_rows: BadRows | None = None,
        limit: int | None = None,
    ) -> None:
        require_choice("long_items", long_items, LongItems)
        self.bad_rows = BadRows() if bad_rows is None else bad_rows
        self._items = items
        self._tokenizer = tokenizer
        self._stops = stop_token_ids
        self._window = window
        self._long_items = long_items
        self._limit = limit
        self._skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[ItemTree]:
        count = 0
        for item in self._items:
            if count == self._limit:
                return
            try:
                tree = self._encoded(item)
            except DataError as error:
                self.bad_rows.add(error)
                continue
            tree = self._fitted(item, tree)
            if tree is not None:
                count += 1
                yield ItemTree(item, tree)

    def skipped(self) -> dict[str, int]:
        """Return how many items are not scored, by reason."""
        counts = {"bad row": self.bad_rows.count, **dict(sorted(self._skipped.items()))}
        return {reason: count for reason, count in counts.items() if count}

    def skipped_message(self) -> str:
        """Return these counts as text, with the first bad row; ``""`` if all items are scored."""
        return counts_message(self.skipped().items(), self.bad_rows)

    def _encoded(self, item: BenchmarkItem) -> PromptTree:
        for i, text in enumerate(item.completions, start=1):
            if not text.strip():
                raise DataError(f"{item.place}: completion {i} is empty: remove the row, or fill it in.")
        return encode(self._example(item), self._tokenizer, stop_token_ids=self._stops)[0]

    def _fitted(self, item: BenchmarkItem, tree: PromptTree) -> PromptTree | None:
        longest = len(tree.prompt_ids) + max(map(len, tree.completion_ids))
        if longest <= self._window.max_length and self._long_items != "cut":
            return tree
        if self._long_items == "error":
            raise DataError(
                f"{item.place}: prompt and longest completion have {longest} tokens, more than max_length="
                f"{self._window.max_length}: raise it, or leave such items out by long_items=skip."
            )
        if self._long_items == "skip":
            self._skipped["longer than the window"] += 1
            return None
        fitted = fit(replace(tree, preference=item.preference), self._window, bos_token_id=self._tokenizer.bos_token_id)
        if fitted.tree is None:
            self._skipped[str(fitted.dropped)] += 1
            return None
        return replace(fitted.tree, preference=None)

    def _example(self, item: BenchmarkItem) -> Example:
        if item.plain is None:
            require_chat_choice(item.prompt, self._tokenizer, None, item.place)
        if isinstance(item.prompt, str) and (item.plain or not self._tokenizer.chat_template):
            return Example(item.prompt, item.completions, None, item.place)
        prompt = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
        answers = tuple([{"role": "assistant", "content": text}] for text in item.completions)
        return Example(prompt, answers, None, item.place)


def read_items(
    benchmark: Benchmark,
    path: str | None,
    *,
    split: str | None = None,
    subsets: Sequence[str] = (),
    bad_rows: BadRows | None = None,
) -> list[BenchmarkItem]:
    """Return the items of a benchmark, or of some of its subsets.

    Args:
        benchmark: The benchmark.
        path: A file or folder; None reads the Hub's dataset.
        split: See :meth:`Benchmark.read`.
        subsets: Subsets to keep; all if empty.
        bad_rows: Collects unusable rows; by default the first one is an error.

    Raises:
        DataError: The source cannot be read, has another schema, lacks a subset, or has no usable row.
    """
    bad_rows = BadRows() if bad_rows is None else bad_rows
    source = path or benchmark.hub_name or benchmark.name
    items = list(benchmark.read(path, split=split, bad_rows=bad_rows))
    if not items:
        reason = f" The first bad row: {bad_rows.messages[0]}" if bad_rows.messages else ""
        raise DataError(f"{source}: it has no usable row.{reason}")
    present = sorted({item.subset for item in items})
    for subset in subsets:
        if subset not in present:
            guess = nearest(subset, present)
            hint = f"did you mean {guess!r}? There are" if guess else "there are"
            raise DataError(
                f"{source}: no row belongs to the subset {subset!r}; {hint} {', '.join(present) or 'no subsets'}."
            )
    return [item for item in items if not subsets or item.subset in subsets]
