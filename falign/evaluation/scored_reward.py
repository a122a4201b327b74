"""The implicit reward of a trained run, as a reward for the completions of another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from falign.evaluation.completion_scorer import CompletionScorer
from falign.rewards.base import column
from falign.rewards.implicit import completion_trees

__all__ = ["ScoredReward"]


@dataclass(frozen=True)
class ScoredReward:
    """The implicit reward of a completion under the run's own objective.

    It reads the columns ``prompt_ids`` and ``completion_ids``, so its models must have the policy's tokens.

    Attributes:
        scorer: The run's policy, reference and objective.
        tokens_per_batch: Tokens that are scored at once, a larger group excepted.
    """

    scorer: CompletionScorer
    tokens_per_batch: int = 4096

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        prompt_ids, completion_ids = (column(columns, name, reward="implicit") for name in _READ)
        trees = completion_trees(prompt_ids, completion_ids, columns.get("place"))
        scored = self.scorer.scorer.in_batches(trees, self.scorer.score, max_tokens=self.tokens_per_batch)
        return [row["implicit_reward"] for rows in scored for row in rows]


_READ = ("prompt_ids", "completion_ids")
