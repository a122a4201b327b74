"""Scores of a benchmark's items under several scorers, written to a file batch by batch, one row per item."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import nn
from typing_extensions import TypedDict

from falign.errors import DataError, RewardError
from falign.evaluation.benchmarks import Benchmark, BenchmarkItem
from falign.evaluation.completion_scorer import CompletionScorer, ScoreRow, check_finite, check_rows
from falign.evaluation.item_stream import ItemTree
from falign.evaluation.score_file import batches_in_order
from falign.evaluation.score_output import ScoreOutput
from falign.objectives.link import Link
from falign.scoring import PromptTree, Scorer
from falign.seeds import mixed

__all__ = [
    "BASELINES",
    "OF_POLICY",
    "OF_REWARD",
    "SCORERS",
    "ComparedScores",
    "ItemRow",
    "ItemScorer",
    "ReferenceFreeScores",
    "score_items",
]

OF_REWARD = ("implicit_reward", "length_normalised")
"""Scorers that need a reference and an objective with an implicit reward."""

OF_POLICY = ("logprob", "mean_logprob")
"""Scorers that need only the policy."""

BASELINES = ("length", "random")
"""Scorers that need no model."""

SCORERS = (*OF_REWARD, "log_ratio", *OF_POLICY, "classifier", *BASELINES)
"""All scorers, in the order of tables."""

TreeScores = Callable[[Sequence[PromptTree]], list[list[dict[str, float]]]]
"""Function from trees to the scores of each of their completions, by name."""


@dataclass(frozen=True)
class ComparedScores:
    """Scores of completions under a policy and its reference.

    Attributes:
        scorer: Scores completions under the policy, its references and its objective.
        rewarding: False if the objective is a substitute for one without implicit reward.
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
            "implicit_reward": _in_order_of(_linked(link, compared), compared),
            "length_normalised": _in_order_of(_linked(link, means), means),
        }


def _linked(link: Link, log_ratios: list[float]) -> list[float]:
    return link.reward(torch.tensor(log_ratios, dtype=torch.float64)).tolist()


def _in_order_of(rewards: list[float], log_ratios: list[float]) -> list[float]:
    """Return rewards in the strict order of the log-ratios, of which they are an increasing function.

    If f' is bounded, its values round to equal numbers far from the reference, in float32 from 17 nats on. A benchmark
    would see ties that the method does not have, so equal rewards are raised to the next larger numbers.
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
    """Scores of completions under a policy without a reference.

    Attributes:
        policy: The model, on the device to compute on.
        scorer: A scorer with a layout that the policy can read.
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
        remaining = iter(scores)
        return [[next(remaining) for _ in tree.completion_ids] for tree in trees]


@dataclass(frozen=True, kw_only=True)
class ItemScorer:
    """Scores items under several scorers in one pass.

    Attributes:
        names: Names of ``SCORERS``, in the order of the results.
        of_trees: Computes the scores that need the policy; None if no name is one of them.
        classifier: A reward of prompts and completions as text, for the scorer ``classifier``.
        seed: Seed of the scorer ``random``, which depends only on it and the item.
    """

    names: tuple[str, ...]
    of_trees: TreeScores | None
    classifier: Callable[..., Sequence[float | None]] | None = None
    seed: int = 0

    def score(self, items: Sequence[ItemTree]) -> list[dict[str, list[float]]]:
        """Return for each item one score per completion under each scorer; larger is better.

        Args:
            items: The items of one batch.

        Raises:
            ModelError: A value is NaN or infinite.
            RewardError: The classifier gives a completion no value, or one that is NaN or infinite.
        """
        trees = [item.tree for item in items]
        by_tree = [[]] * len(items) if self.of_trees is None else self.of_trees(trees)
        by_classifier = self._classified(items) if "classifier" in self.names else [None] * len(items)
        scored: list[dict[str, list[float]]] = []
        for (item, tree), rows, classified in zip(items, by_tree, by_classifier, strict=True):
            scores: dict[str, Any] = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
            scores["classifier"] = classified
            scores["length"] = [float(len(ids)) for ids in tree.counted_ids]
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
                raise RewardError(
                    f"{item.place}: the classifier gives no value to a completion: remove the row, or leave the "
                    "classifier out."
                )
            if not math.isfinite(value):
                raise RewardError(
                    f"{item.place}: the classifier gives a completion the value {value}: check its weights and dtype, "
                    "or remove the row. Scores of earlier rows are kept."
                )
        remaining = iter(values)
        return [[float(next(remaining) or 0.0) for _ in item.completions] for item, _ in items]

    def _random(self, item: BenchmarkItem) -> list[float]:
        generator = Random(mixed(self.seed, item.subset, item.id))
        return [generator.random() for _ in item.completions]


class ItemRow(TypedDict):
    """The scores of one item, and their outcomes.

    Attributes:
        place: The row of the source.
        id: The row's own id, or its number.
        subset: Subset of the benchmark.
        group: Items of one subset and group belong together; ``""`` for a single item.
        preference: One value per completion, larger is preferred.
        num_tokens: Tokens of each completion, including the stop token.
        scores: By scorer, one value per completion; larger is better.
        outcome: By scorer, the benchmark's verdict on the scores.
    """

    place: str
    id: str
    subset: str
    group: str
    preference: list[float]
    num_tokens: list[int]
    scores: dict[str, list[float]]
    outcome: dict[str, dict[str, float]]


def score_items(
    items: Iterable[ItemTree],
    scorer: ItemScorer,
    benchmark: Benchmark,
    output: ScoreOutput,
    *,
    tokens_per_batch: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[ItemRow]:
    """Score items in order, and return the rows of all; the caller finishes the output.

    Batches are the same as in a call that was never stopped, as in :func:`falign.evaluation.score_file.score_trees`.

    Args:
        items: The items, read one at a time.
        scorer: Scores them.
        benchmark: Derives outcomes from scores.
        output: Receives the rows, and has those of an earlier call.
        tokens_per_batch: Maximum number of tokens scored at once; a larger item is scored alone.
        on_batch: Called after each batch with the number of items so far, and how many of them an earlier call had
            scored.

    Raises:
        ConfigError: The output has rows of another source.
        DataError: There is no item.
        ModelError: A value is NaN or infinite.
    """
    rows: list[ItemRow] = []
    resumed = 0
    for batch in batches_in_order(items, max_tokens=tokens_per_batch):
        taken = [output.take_rows([_identity(item)], form=ItemRow) for item in batch]
        finished: list[Any] = [rows[0] for rows in taken if rows is not None]
        new: list[ItemRow] = []
        if len(finished) < len(batch):
            scores = scorer.score(batch)
            new = [
                _row(item, benchmark, values) for item, values in list(zip(batch, scores, strict=True))[len(finished) :]
            ]
            output.append(new)
        resumed += len(finished)
        rows += [*finished, *new]
        if on_batch is not None:
            on_batch(len(rows), resumed)
    if not rows:
        raise DataError("No item is left to score: see the counts of skipped items; fix them, or raise max_length.")
    return rows


def _identity(item: ItemTree) -> dict[str, Any]:
    """Return the fields of a row that are known before scoring."""
    return {
        "place": item.item.place,
        "id": item.item.id,
        "subset": item.item.subset,
        "group": item.item.group,
        "preference": list(item.item.preference),
        "num_tokens": [len(ids) for ids in item.tree.counted_ids],
    }


def _row(item: ItemTree, benchmark: Benchmark, scores: dict[str, list[float]]) -> ItemRow:
    outcome = {name: benchmark.outcome(item.item, values) for name, values in scores.items()}
    row: Any = {**_identity(item), "scores": scores, "outcome": outcome}
    return row
