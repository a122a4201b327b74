"""Metrics of sampled completions, with intervals that resample prompts."""

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
"""By metric for each prompt a numerator and a denominator; the metric is the ratio of their sums."""


def sample_metrics(
    groups: Groups, *, pass_reward: float | None = None, outcome: str | None = None, seed: int = 0
) -> dict[str, Interval]:
    """Return rewards, passes, diversity, entropy and lengths; means over prompts but where it says otherwise.

    =====================  ==================================================================================
    ``reward``             and ``reward/NAME`` of each part, over the completions to which it applies
    ``reward/best_of_k``   the best of k of the policy's own samples, unbiased, for k = 1, 2, 4 ... up to all
    ``pass@k``             where a passing reward is given; unbiased
    ``entropy``            per token, over all tokens of all completions
    ``distinct-1``, ``-2``  different tokens and pairs of tokens among the completions of one prompt
    ``self_bleu``          of each completion against the others of its prompt, where there are others
    ``unique``             share of different completions
    ``length``             tokens; ``clipped``, the share of completions without an end
    =====================  ==================================================================================

    Args:
        groups: The rows of each prompt, equally many.
        pass_reward: What a completion needs to pass; None leaves ``pass@k`` out.
        outcome: Name of the part that decides it, where one that does not apply does not pass; None for the sum.
        seed: Of the resampling.
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
    """Return estimates of divergences between whole completions of policy and reference, nats.

    ======================================  ==================================================================
    ``divergence/F``                        mean of f(u)/u over the policy's completions
    ``divergence/F/reference_samples``      mean of f(u) over the reference's
    ``divergence/reverse_kl/vocabulary``    over the policy's, the whole distributions at each token, summed
    ``divergence/reverse_kl/log_ratio``     over the policy's, mean of log u
    ``divergence/forward_kl/vocabulary``    over the reference's, the whole distributions at each token, summed
    ======================================  ==================================================================

    Args:
        groups: The policy's completions, sampled at temperature 1 from the whole vocabulary, with log-probabilities of
            policy and reference.
        names: f by name.
        reference_groups: The reference's completions, if there are any.
        seed: Of the resampling.
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
    """Resample prompts; those that have nothing of a metric are no samples of it."""
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
