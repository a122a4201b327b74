"""Trees of a source, scored batch by batch into a file, with totals over their completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import torch

from falign.data import BadRowPolicy, BadRows, DataSource, Window, read_tokenized
from falign.data.chat_template import Tokenizer
from falign.data.samples import text_sha256
from falign.errors import DataError
from falign.evaluation.completion_scorer import CompletionScorer, ScoreRow
from falign.evaluation.score_output import ScoreOutput
from falign.objectives import pairs_of
from falign.objectives.groups import accuracies
from falign.scoring import PromptTree

__all__ = ["ScoreTotals", "TreeStream", "batches_in_order", "score_trees"]


@dataclass
class ScoreTotals:
    """Sums over the completions so far.

    Attributes:
        completions: Number of completions.
        resumed: Number of completions that an earlier call had scored.
        tokens: Number of their tokens.
        log_ratio: Sum of their log-ratios.
        implicit_reward: Sum of their implicit rewards.
        pairs: Number of pairs of completions of one row with different preferences.
        right_pairs: Number of pairs in which the preferred completion has the larger reward; a tie counts half.
    """

    completions: int = 0
    resumed: int = 0
    tokens: int = 0
    log_ratio: float = 0.0
    implicit_reward: float = 0.0
    pairs: int = 0
    right_pairs: float = 0.0

    def add(self, rows: Sequence[ScoreRow]) -> None:
        """Count the completions of one tree."""
        self.completions += len(rows)
        self.tokens += sum(row["num_tokens"] for row in rows)
        self.log_ratio += sum(row["log_ratio"] for row in rows)
        self.implicit_reward += sum(row["implicit_reward"] for row in rows)
        preference = [value for row in rows if (value := row["preference"]) is not None]
        if len(preference) == len(rows) > 1:
            chosen, rejected = pairs_of(torch.tensor(preference), torch.zeros(len(rows), dtype=torch.long))
            rewards = torch.tensor([row["implicit_reward"] for row in rows])
            self.pairs += len(chosen)
            self.right_pairs += accuracies(rewards[chosen] - rewards[rejected]).sum().item()

    @property
    def mean_log_ratio(self) -> float:
        """Mean log-ratio of a completion, nats."""
        return self.log_ratio / self.completions

    @property
    def mean_implicit_reward(self) -> float:
        """Mean implicit reward of a completion."""
        return self.implicit_reward / self.completions

    @property
    def reward_accuracy(self) -> float | None:
        """Share of pairs in which the preferred completion has the larger reward; None without pairs."""
        return self.right_pairs / self.pairs if self.pairs else None


def score_trees(
    trees: Iterable[PromptTree],
    scorer: CompletionScorer,
    output: ScoreOutput,
    *,
    tokens_per_batch: int,
    on_batch: Callable[[ScoreTotals], None] | None = None,
) -> ScoreTotals:
    """Score trees in order, and finish the output when all are scored.

    Batches are the same as in a call that was never stopped: a batch of which some rows are missing is scored again as
    a whole, and only the missing rows are written. So the last digits, which depend on the batch, are the same too.

    Args:
        trees: The trees, read one at a time.
        scorer: Scores completions under policy, references and objective.
        output: Receives the rows, and has those of an earlier call.
        tokens_per_batch: Maximum number of tokens scored at once; a larger tree is scored alone.
        on_batch: Called after each batch with the totals so far.

    Raises:
        ConfigError: The output has rows of another source.
        DataError: There is no tree.
        ModelError: A value is NaN or infinite.
    """
    totals = ScoreTotals()
    for batch in batches_in_order(trees, max_tokens=tokens_per_batch):
        finished = [rows for tree in batch if (rows := output.take(tree)) is not None]
        new: list[list[ScoreRow]] = []
        if len(finished) < len(batch):
            new = scorer.score(batch)[len(finished) :]
            output.append(row for rows in new for row in rows)
        totals.resumed += sum(map(len, finished))
        for rows in (*finished, *new):
            totals.add(rows)
        if on_batch is not None:
            on_batch(totals)
    if not totals.completions:
        raise DataError(
            "No completion is left to score: see the counts of dropped rows, and fix them or raise max_length."
        )
    output.finish()
    return totals


@runtime_checkable
class _Sized(Protocol):
    @property
    def num_tokens(self) -> int: ...


TreeT = TypeVar("TreeT", bound=_Sized)


class TreeStream:
    """The trees of a source with hashes of their texts, one at a time, and counts of rows that are cut or dropped.

    Args:
        source: The rows.
        tokenizer: The policy's tokenizer.
        stop_token_ids: All tokens at which the model's generation ends.
        window: Maximum lengths, and the handling of longer rows.
        bad_rows: ``"error"`` stops at the first unusable row, ``"skip"`` counts and skips them.
        skip_by: The user's way to ask for ``"skip"``, for messages.

    Attributes:
        bad_rows: The number of bad rows so far, and the first messages.
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
        for example, tokenized in self._rows:
            if tokenized.tree is None:
                self._counts[f"dropped: {tokenized.dropped}"] += 1
                continue
            self._counts["prompts cut"] += tokenized.prompt_tokens_cut > 0
            self._counts["completions cut"] += tokenized.completions_cut
            hashes = tuple(text_sha256(example.prompt, each) for each in example.completions)
            yield replace(tokenized.tree, text_sha256=hashes)

    def counts(self) -> list[tuple[str, int]]:
        """Return the number of rows that are dropped or cut, by label, without zeros."""
        counts = [("bad rows", self.bad_rows.count), *sorted(self._counts.items())]
        return [(label, count) for label, count in counts if count]

    def message(self) -> str:
        """Return these counts as text, with the first bad row; ``""`` if all rows are scored whole."""
        return counts_message(self.counts(), self.bad_rows)


def counts_message(counts: Iterable[tuple[str, int]], bad_rows: BadRows) -> str:
    """Return counts of rows as text, with the message of the first bad row.

    Example:
        >>> bad_rows = BadRows("skip")
        >>> bad_rows.add(DataError("pairs.jsonl:3: 'chosen' is empty"))
        >>> counts_message([("bad rows", 1), ("prompts cut", 2)], bad_rows)
        "bad rows: 1; prompts cut: 2 (the first bad row: pairs.jsonl:3: 'chosen' is empty)"
    """
    first = f" (the first bad row: {bad_rows.messages[0]})" if bad_rows.messages else ""
    return "; ".join(f"{label}: {count}" for label, count in counts) + first


def batches_in_order(trees: Iterable[TreeT], *, max_tokens: int) -> Iterator[list[TreeT]]:
    """Yield trees in order, in batches with a maximum number of tokens.

    Args:
        trees: Trees, or other objects with ``num_tokens``, read one at a time.
        max_tokens: Maximum number of tokens of a batch; a larger tree is a batch of its own.

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
