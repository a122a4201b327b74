"""The trees of a source as a stream, and batches of them in the order of the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

from falign.data import BadRowPolicy, BadRows, DataSource, Window, read_tokenized
from falign.data.chat_template import Tokenizer
from falign.scoring import PromptTree

__all__ = ["TreeStream", "batches_in_order"]


@runtime_checkable
class _Sized(Protocol):
    @property
    def num_tokens(self) -> int: ...


TreeT = TypeVar("TreeT", bound=_Sized)


class TreeStream:
    """The trees of a source, each read and tokenised when it is asked for, and counts of what was done to the rows.

    Args:
        source: Where the rows are.
        tokenizer: The policy's.
        stop_token_ids: All tokens at which the model's generation ends.
        window: Lengths, and what happens to what is longer.
        bad_rows: ``"error"`` stops at a row that cannot be used, ``"skip"`` leaves it out and counts it.
        skip_by: How the user asks for ``"skip"``, for messages.

    Attributes:
        bad_rows: The count of bad rows so far, and the first messages.
    """

    def __init__(
        self,
        source: DataSource,
        tokenizer: Tokenizer,
        *,
        stop_token_ids: Collection[int],
        window: Window,
        bad_rows: BadRowPolicy = "error",
        skip_by: str = "bad_rows=skip",
    ) -> None:
        self.bad_rows = BadRows(bad_rows, skip_by=skip_by)
        self._counts: Counter[str] = Counter()
        self._rows = read_tokenized(
            source, tokenizer, stop_token_ids=stop_token_ids, window=window, bad_rows=self.bad_rows
        )

    def __iter__(self) -> Iterator[PromptTree]:
        for _, tokenized in self._rows:
            if tokenized.tree is None:
                self._counts[f"dropped: {tokenized.dropped}"] += 1
                continue
            self._counts["prompts cut"] += tokenized.prompt_tokens_cut > 0
            self._counts["completions cut"] += tokenized.completions_cut
            yield tokenized.tree

    def counts(self) -> list[tuple[str, int]]:
        """Return label and count of what is not scored as it stands in the source, where there is any."""
        counts = [("bad rows", self.bad_rows.count), *sorted(self._counts.items())]
        return [(label, count) for label, count in counts if count]


def batches_in_order(trees: Iterable[TreeT], *, max_tokens: int) -> Iterator[list[TreeT]]:
    """Yield trees in their order, in batches of at most so many tokens.

    Args:
        trees: Any number of trees, or of what holds one and has its ``num_tokens``, read as they are needed.
        max_tokens: The budget; a tree of more tokens is a batch of its own.

    Example:
        >>> trees = [PromptTree((5,), ((6,) * n,)) for n in (1, 2, 9, 1)]
        >>> [[tree.num_tokens for tree in batch] for batch in batches_in_order(trees, max_tokens=5)]
        [[2, 3], [10], [2]]
    """
    batch: list[TreeT] = []
    room = max_tokens
    for tree in trees:
        if batch and tree.num_tokens > room:
            yield batch
            batch, room = [], max_tokens
        batch.append(tree)
        room -= tree.num_tokens
    if batch:
        yield batch
