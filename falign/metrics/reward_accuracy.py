"""Reward accuracy: how often the preferred completion has the larger reward. A tie, up to rounding, counts half."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch
from typing_extensions import override

from falign.metrics.intervals import Interval, bootstrap
from falign.metrics.numbers import Array, Numbers, float_array
from falign.objectives.groups import accuracies, pairs_of

__all__ = ["RewardAccuracy", "outcomes", "pair_outcomes", "reward_accuracy", "top1_accuracy"]


def outcomes(first: Numbers, second: Numbers) -> Array:
    """Return 1 where the first of two rewards is larger, 0 where it is smaller, and ½ at a tie.

    Args:
        first: Rewards.
        second: The rewards to compare with, as many.

    Returns:
        One outcome for each; rewards that differ by rounding (1e-6, relative and absolute) tie.

    Raises:
        ValueError: Their numbers differ.

    Example:
        >>> outcomes([2.0, 1.0, 0.0], [1.0, 1.0, 3.0]).tolist()
        [1.0, 0.5, 0.0]
    """
    a, b = torch.from_numpy(float_array(first, "first")), torch.from_numpy(float_array(second, "second"))
    if len(a) != len(b):
        raise ValueError(f"{len(a)} rewards are compared with {len(b)}; give as many of both.")
    size = torch.maximum(a.abs(), b.abs())
    # Infinite rewards are either equal or not; their differences have no rounding error.
    return accuracies(torch.where(a == b, 0.0, a - b), size.masked_fill(size.isinf(), 0.0)).numpy()


def pair_outcomes(rewards: Numbers, preference: Numbers) -> Array:
    """Return the :func:`outcomes` of one prompt: one for each pair of completions that differ in preference.

    Args:
        rewards: One per completion.
        preference: One per completion; larger is preferred. For a pair 1 and 0.

    Returns:
        1 where the preferred one of the two has the larger reward; empty if all are equally preferred.

    Raises:
        ValueError: Their numbers differ.

    Example:
        >>> pair_outcomes([0.5, -1.0, 2.0], [3.0, 1.0, 2.0]).tolist()  # first above second, first above third, ...
        [1.0, 0.0, 1.0]
    """
    values, order = float_array(rewards, "rewards"), torch.from_numpy(float_array(preference, "preference"))
    if len(values) != len(order):
        raise ValueError(f"{len(values)} rewards but {len(order)} preferences; give one each per completion.")
    chosen, rejected = pairs_of(order, torch.zeros(len(order), dtype=torch.long))
    return outcomes(values[chosen.numpy()], values[rejected.numpy()])


def reward_accuracy(
    rewards: Sequence[Numbers], preferences: Sequence[Numbers], *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the share of all pairs of completions of one prompt in which the preferred one has the larger reward.

    It is the objectives' ``rewards/accuracies``: a list counts with all its pairs.

    Args:
        rewards: For each prompt one per completion.
        preferences: For each prompt one per completion; larger is preferred, equal ones are not compared.
        level: Of the interval, which resamples prompts.
        seed: Of the resampling.

    Returns:
        The share and its interval.

    Raises:
        ValueError: A prompt has different numbers of both, a reward is NaN, or no two completions differ in preference.

    Example:
        >>> reward_accuracy([[2.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]).value
        0.75
    """
    per_prompt = [pair_outcomes(*item) for item in _checked(rewards, preferences)]
    right, count = np.array([item.sum() for item in per_prompt]), np.array([len(item) for item in per_prompt])
    return bootstrap(lambda index: float(right[index].sum() / count[index].sum()), len(count), level=level, seed=seed)


def top1_accuracy(
    rewards: Sequence[Numbers], preferences: Sequence[Numbers], *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the share of prompts in which a most preferred completion has the largest reward.

    It is the ``rewards/top1`` of :class:`falign.objectives.Listwise`, and the accuracy of best-of-4 benchmarks. The
    arguments are those of :func:`reward_accuracy`.
    """
    best, others = [], []
    for values, preference in _checked(rewards, preferences):
        is_best = [value == max(preference) for value in preference]
        best.append(max(value for value, yes in zip(values, is_best, strict=True) if yes))
        others.append(max(value for value, yes in zip(values, is_best, strict=True) if not yes))
    right = outcomes(best, others)
    return bootstrap(lambda index: float(right[index].mean()), len(right), level=level, seed=seed)


class RewardAccuracy(evaluate.Metric):
    """:func:`reward_accuracy` and :func:`top1_accuracy` of rewards (predictions) and preferences (references)."""

    @override
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions: per prompt, the rewards of its completions. references: their preference, "
            "larger is preferred; [1, 0] for a pair.",
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.List(datasets.Value("float64")),
                }
            ),
        )

    @override
    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]: called with the features by name
        self, *, predictions: list[list[float]], references: list[list[float]], level: float = 0.95, seed: int = 0
    ) -> dict[str, float]:
        return {
            **reward_accuracy(predictions, references, level=level, seed=seed).entries("reward_accuracy"),
            **top1_accuracy(predictions, references, level=level, seed=seed).entries("top1"),
        }


def _checked(rewards: Sequence[Numbers], preferences: Sequence[Numbers]) -> list[tuple[Array, Array]]:
    """The prompts with at least one pair; the others do not count."""
    if len(rewards) != len(preferences):
        raise ValueError(f"{len(rewards)} prompts have rewards and {len(preferences)} preferences; give both for each.")
    prompts = [
        (float_array(values, f"rewards[{i}]"), float_array(preference, f"preferences[{i}]"))
        for i, (values, preference) in enumerate(zip(rewards, preferences, strict=True))
    ]
    for i, (values, preference) in enumerate(prompts):
        if len(values) != len(preference):
            raise ValueError(
                f"Prompt {i} has {len(values)} rewards but {len(preference)} preferences; give one each per completion."
            )
        for name, row in (("rewards", values), ("preferences", preference)):
            if np.isnan(row).any():
                raise ValueError(f"{name}[{i}] is {row.tolist()}; leave out the completions without a value.")
    compared = [pair for pair in prompts if len(set(pair[1].tolist())) > 1]
    if not compared:
        raise ValueError(
            "No two completions of one prompt differ in preference; a pair has preferences such as [1, 0]."
        )
    return compared
