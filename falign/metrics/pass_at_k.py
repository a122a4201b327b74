"""pass@k: the probability that one or more of k samples passes, estimated without bias from n ≥ k of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch
from typing_extensions import override

from falign.metrics.intervals import Interval, bootstrap
from falign.metrics.numbers import Array, Numbers, float_array
from falign.rewards import groups

__all__ = ["PassAtK", "pass_at_k", "pass_at_k_per_prompt"]


def pass_at_k_per_prompt(rewards: Sequence[Numbers], k: int, *, pass_reward: float = 1.0) -> Array:
    """Return :func:`falign.rewards.pass_at_k` of each prompt.

    Args:
        rewards: For each prompt one reward per sample; prompts may have different numbers of samples.
        k: At most the number of samples of any prompt.
        pass_reward: The reward that a sample needs to pass.

    Returns:
        One estimate per prompt.

    Raises:
        ValueError: There are no prompts, one has fewer than k samples, or a reward or ``pass_reward`` is NaN.

    Example:
        >>> pass_at_k_per_prompt([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0]], 2).tolist()
        [0.5, 1.0]
    """
    if len(rewards) == 0:
        raise ValueError("There are no prompts; pass@k needs the rewards of the samples of one or more.")
    if math.isnan(pass_reward):
        raise ValueError("pass_reward is nan, which no reward reaches or misses; give a number.")
    estimates = []
    for i, row in enumerate(rewards):
        values = torch.from_numpy(float_array(row, f"rewards[{i}]"))
        if not 1 <= k <= len(values):
            raise ValueError(f"rewards[{i}] has {len(values)} samples; pass@{k} needs k from 1 to their number.")
        if values.isnan().any():
            raise ValueError(f"rewards[{i}] is {values.tolist()}; leave out the samples without a value.")
        # The rate times n is an integer up to rounding error.
        passed = (groups.pass_rates(values, threshold=pass_reward) * len(values)).round().long()
        estimates.append(groups.pass_at_k(len(values), passed, k).item())
    return np.array(estimates)


def pass_at_k(
    rewards: Sequence[Numbers], k: int, *, pass_reward: float = 1.0, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the mean of :func:`pass_at_k_per_prompt`, with an interval that resamples prompts.

    Args:
        rewards: See there.
        k: See there.
        pass_reward: See there.
        level: Nominal coverage of the interval.
        seed: Seed of the resampling.

    Returns:
        pass@k and its interval.
    """
    estimates = pass_at_k_per_prompt(rewards, k, pass_reward=pass_reward)
    return bootstrap(lambda index: float(estimates[index].mean()), len(estimates), level=level, seed=seed)


class PassAtK(evaluate.Metric):
    """:func:`pass_at_k` of the rewards of each prompt's samples (predictions)."""

    @override
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="Chen et al., Evaluating Large Language Models Trained on Code, arXiv:2107.03374",
            inputs_description="predictions: the rewards of each prompt's samples. k: numbers of "
            "samples to choose from them. pass_reward: the reward that a sample needs to pass.",
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float64"))}),
        )

    @override
    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]: called with the features by name
        self,
        *,
        predictions: list[list[float]],
        k: Sequence[int] = (1,),
        pass_reward: float = 1.0,
        level: float = 0.95,
        seed: int = 0,
    ) -> dict[str, float]:
        scores: dict[str, float] = {}
        for each in k:
            estimate = pass_at_k(predictions, each, pass_reward=pass_reward, level=level, seed=seed)
            scores |= estimate.entries(f"pass@{each}")
        return scores
