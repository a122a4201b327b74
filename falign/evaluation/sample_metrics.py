"""Metrics of sampled completions, with bootstrap intervals over prompts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from falign.divergences import Divergence, estimators
from falign.evaluation.sample_scorer import SampleRow
from falign.metrics.intervals import Interval, bootstrap
from falign.rewards.groups import pass_rates
from falign.training.online.metrics import draw_values

__all__ = ["divergence_metrics", "sample_metrics"]

Groups = Sequence[Sequence[SampleRow]]
Shares = dict[str, list[tuple[float, float]]]
"""A numerator and a denominator of each prompt, by metric; a metric is the ratio of their sums."""


def sample_metrics(
    groups: Groups, *, pass_reward: float | None = None, outcome: str | None = None, seed: int = 0
) -> dict[str, Interval]:
    """Return rewards, pass rates, diversity, entropy and lengths: means over prompts unless stated otherwise.

    =====================  ==================================================================================
    ``reward``             and ``reward/NAME`` of each part, over the completions to which it applies
    ``reward/best_of_k``   the best of k of the policy's own samples, unbiased, for k = 1, 2, 4 ... up to all
    ``pass@k``             if a passing reward is given; unbiased
    ``entropy``            per token, over all tokens of all completions
    ``distinct-1``, ``-2``  different tokens and pairs of tokens among the completions of one prompt
    ``self_bleu``          of each completion against the others of its prompt, if there are several
    ``unique``             share of different completions
    ``length``             tokens; ``clipped``, the share of completions that hit the limit
    =====================  ==================================================================================

    Args:
        groups: The rows of each prompt, the same number for all.
        pass_reward: The least reward of a completion that passes; None leaves ``pass@k`` out.
        outcome: Name of the reward that decides; a completion to which it does not apply fails. None for the sum.
        seed: Seed of the resampling.
    """
    from falign.metrics.self_bleu import self_bleu

    size = len(groups[0])
    rewards = torch.tensor([[row["reward"] for row in group] for group in groups], dtype=torch.float64)
    metrics: dict[str, list[float]] = {"reward": rewards.mean(dim=1).tolist()}
    passed = None
    if pass_reward is not None:
        outcomes = [[row["reward"] if outcome is None else row["parts"][outcome] for row in group] for group in groups]
        outcome_values = torch.tensor(
            [[-math.inf if v is None else v for v in row] for row in outcomes], dtype=torch.float64
        )
        passed = (pass_rates(outcome_values, threshold=pass_reward) * size).round().long()
    values = draw_values(rewards, [[row["token_ids"] for row in group] for group in groups], passed=passed)
    metrics |= {name: each.tolist() for name, each in values.items()}
    if size > 1:
        metrics["self_bleu"] = [self_bleu([row["completion"] for row in group]) for group in groups]
    metrics["length"] = _means(groups, lambda row: row["num_tokens"])
    metrics["clipped"] = _means(groups, lambda row: row["finish_reason"] == "length")
    shares: Shares = {name: [(value, 1.0) for value in values] for name, values in metrics.items()}
    shares["entropy"] = [
        (sum(row["entropy"] * row["num_tokens"] for row in group), sum(row["num_tokens"] for row in group))
        for group in groups
    ]
    for name in groups[0][0]["parts"]:
        applying = [[value for row in group if (value := row["parts"][name]) is not None] for group in groups]
        shares[f"reward/{name}"] = [(sum(values), len(values)) for values in applying]
    return _intervals(shares, seed)


def divergence_metrics(
    groups: Groups, names: Mapping[str, Divergence], *, reference_groups: Groups | None = None, seed: int = 0
) -> dict[str, Interval]:
    """Return estimates of divergences between policy and reference, over whole completions, in nats.

    ======================================  ==================================================================
    ``divergence/F``                        mean of f(u)/u over the policy's completions
    ``divergence/F/reference_samples``      mean of f(u) over the reference's completions
    ``divergence/reverse_kl/vocabulary``    summed over tokens from whole distributions, policy's completions
    ``divergence/reverse_kl/log_ratio``     mean of log u over the policy's completions
    ``divergence/forward_kl/vocabulary``    summed over tokens from whole distributions, reference's completions
    ======================================  ==================================================================

    Args:
        groups: The policy's completions, sampled at temperature 1 from the whole vocabulary, with log-probabilities of
            policy and reference.
        names: Divergences by name.
        reference_groups: The reference's completions; None leaves their metrics out.
        seed: Seed of the resampling.
    """
    log_ratio = _log_ratios(groups)
    values = {
        f"divergence/{name}": estimators.value_from_policy(divergence, log_ratio) for name, divergence in names.items()
    }
    metrics = {name: value.mean(dim=1).tolist() for name, value in values.items()}
    metrics["divergence/reverse_kl/vocabulary"] = _means(groups, lambda row: row["token_divergence"])
    metrics["divergence/reverse_kl/log_ratio"] = log_ratio.mean(dim=1).tolist()
    found = _intervals({name: [(value, 1.0) for value in values] for name, values in metrics.items()}, seed)
    if reference_groups is None:
        return found
    log_ratio = _log_ratios(reference_groups)
    metrics = {
        f"divergence/{name}/reference_samples": estimators.value_from_reference(divergence, log_ratio)
        .mean(dim=1)
        .tolist()
        for name, divergence in names.items()
    }
    metrics["divergence/forward_kl/vocabulary"] = _means(reference_groups, lambda row: row["token_divergence"])
    return found | _intervals({name: [(value, 1.0) for value in values] for name, values in metrics.items()}, seed)


def _log_ratios(groups: Groups) -> torch.Tensor:
    logprobs = torch.tensor([[row["logprob"] for row in group] for group in groups], dtype=torch.float64)
    reference: list[Any] = [[row["reference_logprob"] for row in group] for group in groups]
    return logprobs - torch.tensor(reference, dtype=torch.float64)


def _means(groups: Groups, value: Callable[[SampleRow], Any]) -> list[float]:
    return [fmean(float(value(row)) for row in group) for group in groups]


def _intervals(shares: Shares, seed: int) -> dict[str, Interval]:
    """Return each metric with its interval; a prompt is resampled only for metrics that it has values for."""
    # Metrics of the same prompts share their resamples.
    alike: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, values in shares.items():
        alike[tuple(i for i, (_, denominator) in enumerate(values) if denominator)].append(name)
    found: dict[str, Interval] = {}
    for prompts, names in alike.items():
        if not prompts:
            continue
        table = np.array([[shares[name][i] for i in prompts] for name in names], dtype=np.float64)

        def statistic(index: NDArray[np.int64], table: NDArray[np.float64] = table) -> NDArray[np.float64]:
            sums = table[:, index].sum(axis=1)
            return sums[:, 0] / sums[:, 1]

        values, low, high = bootstrap(statistic, len(prompts), seed=seed)
        found |= {name: Interval(float(values[i]), float(low[i]), float(high[i])) for i, name in enumerate(names)}
    return {name: found[name] for name in shares if name in found}
