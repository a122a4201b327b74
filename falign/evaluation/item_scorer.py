"""The scores of a benchmark's completions under several scorers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import nn

from falign.errors import RewardError
from falign.evaluation.benchmarks import BenchmarkItem
from falign.evaluation.completion_scorer import CompletionScorer, ScoreRow, check_finite, check_rows
from falign.evaluation.item_stream import ItemTree
from falign.objectives.link import Link
from falign.scoring import PromptTree, Scorer
from falign.seeds import mixed

__all__ = ["BASELINES", "OF_POLICY", "OF_REWARD", "SCORERS", "ComparedScores", "ItemScorer", "ReferenceFreeScores"]

OF_REWARD = ("implicit_reward", "length_normalised")
"""Scorers that need a reference and an objective."""

OF_POLICY = ("logprob", "mean_logprob")
"""Scorers that need the policy alone."""

BASELINES = ("length", "random")
"""Scorers that do not read the completions."""

SCORERS = (*OF_REWARD, "log_ratio", *OF_POLICY, "classifier", *BASELINES)
"""All of them, in the order of tables."""

TreeScores = Callable[[Sequence[PromptTree]], list[list[dict[str, float]]]]
"""From trees to the scores of each completion of each tree, by name."""


@dataclass(frozen=True)
class ComparedScores:
    """Scores of completions under a policy and its reference.

    Attributes:
        scorer: Policy, reference and objective.
        rewarding: Whether the objective is the policy's own, so that its implicit reward means something.
    """

    scorer: CompletionScorer
    rewarding: bool = True

    def __call__(self, trees: Sequence[PromptTree]) -> list[list[dict[str, float]]]:
        return [self._of_tree(rows) for rows in self.scorer.score(trees)]

    def _of_tree(self, rows: Sequence[ScoreRow]) -> list[dict[str, float]]:
        log_ratios = [row["log_ratio"] for row in rows]
        counts = [row["num_tokens"] for row in rows]
        logprobs = [sum(row["logprobs"]) for row in rows]
        columns = {
            "log_ratio": log_ratios,
            "logprob": logprobs,
            "mean_logprob": [logprob / count for logprob, count in zip(logprobs, counts, strict=True)],
        }
        if self.rewarding:
            columns |= self._rewards([row["implicit_reward"] for row in rows], log_ratios, counts)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _rewards(self, rewards: list[float], log_ratios: list[float], counts: list[int]) -> dict[str, list[float]]:
        link = self.scorer.objective.link
        if link is None:
            per_token = [reward / count for reward, count in zip(rewards, counts, strict=True)]
            return {"implicit_reward": rewards, "length_normalised": per_token}
        means = [log_ratio / count for log_ratio, count in zip(log_ratios, counts, strict=True)]
        compared = means if link.length_norm == "token" else log_ratios
        return {
            "implicit_reward": _rising(_linked(link, compared), compared),
            "length_normalised": _rising(_linked(link, means), means),
        }


def _linked(link: Link, log_ratios: list[float]) -> list[float]:
    return link.reward(torch.tensor(log_ratios, dtype=torch.float64)).tolist()


def _rising(rewards: list[float], log_ratios: list[float]) -> list[float]:
    """Return rewards in the strict order of what they are a rising function of.

    Where f' is bounded its numbers become equal, in float32 from 17 nats on, and a benchmark would see ties that the
    method does not have.
    """
    ordered = list(rewards)
    places = sorted(range(len(rewards)), key=log_ratios.__getitem__)
    for lower, higher in pairwise(places):
        if log_ratios[lower] == log_ratios[higher]:
            ordered[higher] = ordered[lower]
        else:
            ordered[higher] = max(ordered[higher], math.nextafter(ordered[lower], math.inf))
    return ordered


@dataclass(frozen=True, kw_only=True)
class ReferenceFreeScores:
    """Scores of completions under a policy alone.

    Attributes:
        policy: The model, on the device to compute on.
        scorer: Its layout is one that the policy can read.
    """

    policy: nn.Module
    scorer: Scorer

    def __call__(self, trees: Sequence[PromptTree]) -> list[list[dict[str, float]]]:
        check_rows(self.policy, trees)
        bare = [replace(tree, preference=None) for tree in trees]
        batch = self.scorer.lay_out(bare, model=self.policy)
        logprobs = self.scorer.scores(self.policy, batch).logprobs
        check_finite(logprobs, batch, "logprobs")
        values = zip(logprobs.double().sum(dim=-1).tolist(), batch.completion_mask.sum(dim=-1).tolist(), strict=True)
        scores = [{"logprob": logprob, "mean_logprob": logprob / count} for logprob, count in values]
        taken = iter(scores)
        return [[next(taken) for _ in tree.completion_ids] for tree in trees]


@dataclass(frozen=True, kw_only=True)
class ItemScorer:
    """Scores items under several scorers in one pass.

    Attributes:
        names: Which of ``SCORERS``, in the order of the results.
        of_trees: What computes the policy's scores; None where none of the names is one of them.
        classifier: A reward called with prompts and completions as text; needed for ``classifier``.
        seed: Of ``random``, which depends on it and on the item alone.
    """

    names: tuple[str, ...]
    of_trees: TreeScores | None
    classifier: Callable[..., Sequence[float | None]] | None = None
    seed: int = 0

    def score(self, items: Sequence[ItemTree]) -> list[dict[str, list[float]]]:
        """Return for each item one score per completion under each scorer; larger is better.

        Args:
            items: What is scored at once.

        Raises:
            ModelError: A value is not finite.
            RewardError: The classifier has no value for a completion.
        """
        trees = [item.tree for item in items]
        by_tree = [[]] * len(items) if self.of_trees is None else self.of_trees(trees)
        by_classifier = self._classified(items) if "classifier" in self.names else [None] * len(items)
        scored: list[dict[str, list[float]]] = []
        for (item, tree), rows, classified in zip(items, by_tree, by_classifier, strict=True):
            scores: dict[str, Any] = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
            scores["classifier"] = classified
            scores["length"] = [float(len(ids)) for ids in tree.completion_ids]
            scores["random"] = self._random(item)
            scored.append({name: scores[name] for name in self.names})
        return scored

    def _classified(self, items: Sequence[ItemTree]) -> list[list[float]]:
        assert self.classifier is not None
        flat = [(item, text) for item, _ in items for text in item.completions]
        values = self.classifier(
            [item.prompt for item, _ in flat], [text for _, text in flat], place=[item.place for item, _ in flat]
        )
        for (item, _), value in zip(flat, values, strict=True):
            if value is None:
                raise RewardError(f"{item.place}: the classifier has no value for a completion; leave it out.")
            if not math.isfinite(value):
                raise RewardError(
                    f"{item.place}: the classifier says {value} of a completion. Check its weights and its dtype, or "
                    "remove the row; what was scored before it is kept."
                )
        taken = iter(values)
        return [[float(next(taken) or 0.0) for _ in item.completions] for item, _ in items]

    def _random(self, item: BenchmarkItem) -> list[float]:
        generator = Random(mixed(self.seed, item.subset, item.id))
        return [generator.random() for _ in item.completions]
