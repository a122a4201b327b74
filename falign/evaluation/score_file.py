"""A stream of trees scored into a file, and what its completions come to on the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from falign.errors import DataError
from falign.evaluation.completion_scorer import CompletionScorer
from falign.evaluation.score_output import ScoreOutput
from falign.evaluation.score_rows import ScoreRow
from falign.evaluation.tree_stream import batches_in_order
from falign.objectives import pairs_of
from falign.objectives.pairs import accuracies
from falign.scoring import PromptTree

__all__ = ["ScoreTotals", "score_trees"]


@dataclass
class ScoreTotals:
    """Sums over the completions so far.

    Attributes:
        completions: How many there are.
        resumed: How many of them an earlier call had scored.
        tokens: Their tokens.
        log_ratio: Sum of their log-ratios.
        implicit_reward: Sum of their implicit rewards.
        pairs: How many pairs of completions of one row have different preference.
        right_pairs: In how many of them the preferred one has the larger reward; a tie counts half.
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
        """Share of pairs in which the preferred one has the larger reward; None where there are no pairs."""
        return self.right_pairs / self.pairs if self.pairs else None


def score_trees(
    trees: Iterable[PromptTree],
    scorer: CompletionScorer,
    output: ScoreOutput,
    *,
    tokens_per_batch: int,
    on_batch: Callable[[ScoreTotals], None] | None = None,
) -> ScoreTotals:
    """Score trees in their order, and give the output its name when all are scored.

    Batches are those of a run that was never stopped: where one was left half written it is scored again as a whole,
    and what was missing of it is written.

    Args:
        trees: Read as they are needed.
        scorer: Policy, reference and objective.
        output: Where rows go, and where those of an earlier call are.
        tokens_per_batch: Most tokens that are scored at once, a larger tree excepted.
        on_batch: Called with the totals so far after each batch.

    Raises:
        ConfigError: The source is not the one of the rows that are there.
        DataError: There is no tree.
        ModelError: A value is not finite.
    """
    totals = ScoreTotals()
    for batch in batches_in_order(trees, max_tokens=tokens_per_batch):
        there = [rows for tree in batch if (rows := output.take(tree)) is not None]
        new: list[list[ScoreRow]] = []
        if len(there) < len(batch):
            new = scorer.score(batch)[len(there) :]
            output.append(row for rows in new for row in rows)
        totals.resumed += sum(map(len, there))
        for rows in (*there, *new):
            totals.add(rows)
        if on_batch is not None:
            on_batch(totals)
    if not totals.completions:
        raise DataError("No completion was left to score: see what became of the rows, and mend or lengthen them.")
    output.finish()
    return totals
