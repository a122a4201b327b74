"""Quantities under the names by which TRL logs them, beside falign's own names; docs/metrics.md defines each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from falign import divergences
from falign.divergences import estimators
from falign.divergences.powers import power
from falign.objectives import CompletionBatch
from falign.references import ObjectiveInputs
from falign.scoring import TokenBatch

__all__ = [
    "clip_metrics",
    "correction_metrics",
    "data_metrics",
    "kl_to_reference",
    "length_metrics",
    "num_tokens",
    "reward_metrics",
    "sampling_metrics",
]


def num_tokens(batch: TokenBatch) -> int:
    """Return the tokens of all completions of a micro-batch, each with its prompt, as TRL counts them."""
    # The prompt ends where the first token of the completion is predicted.
    prompts = batch.position_ids.flatten()[batch.predictor[:, 0]] + 1
    return int(prompts.sum() + batch.completion_mask.sum())


def data_metrics(scored: ObjectiveInputs) -> dict[str, Float[Tensor, " M"]]:
    """Return ``mean_token_accuracy`` and ``logits/*`` of completions from data, one value per token.

    With preferences the accuracy is that of chosen completions. Of a list, the best is chosen and the worst rejected.

    Args:
        scored: The scored micro-batch.
    """
    batch, mask = scored.completions, scored.completions.completion_mask
    if batch.preference is None:
        return {"mean_token_accuracy": scored.most_likely[mask]}
    chosen, rejected = _sides(batch.preference, batch.prompt_index)
    chosen, rejected = chosen[:, None] & mask, rejected[:, None] & mask
    return {
        "mean_token_accuracy": scored.most_likely[chosen],
        "logits/chosen": scored.mean_logits[chosen],
        "logits/rejected": scored.mean_logits[rejected],
    }


def _sides(preference: Float[Tensor, " N"], prompt_index: Int[Tensor, " N"]) -> tuple[Tensor, Tensor]:
    """Return which completions are the best and the worst of their prompt; those that stand alone are labeled."""
    _, group, sizes = torch.unique(prompt_index, return_inverse=True, return_counts=True)
    best = torch.full_like(sizes, -torch.inf, dtype=preference.dtype).scatter_reduce(0, group, preference, "amax")
    worst = torch.full_like(sizes, torch.inf, dtype=preference.dtype).scatter_reduce(0, group, preference, "amin")
    alone = (sizes == 1)[group]
    chosen = torch.where(alone, preference > 0, preference == best[group])
    return chosen, torch.where(alone, preference <= 0, preference == worst[group]) & ~chosen


def clip_metrics(metrics: Mapping[str, Tensor], lengths: Int[Tensor, " N"]) -> dict[str, Tensor]:
    """Return ``clip_ratio/low_*``, ``high_*`` and ``region_mean``, where the objective clips.

    Means are over tokens, extremes over completions.

    Args:
        metrics: The objective's; ``clip_ratio/low`` and ``clip_ratio/high`` are shares of each completion's tokens,
            shape (N,).
        lengths: Tokens of each completion.
    """
    shares = {side: metrics[name] for side in ("low", "high") if (name := f"clip_ratio/{side}") in metrics}
    if not shares or any(share.shape != lengths.shape for share in shares.values()):  # none, or a user's own
        return {}
    found = {f"clip_ratio/{side}_mean": share.repeat_interleave(lengths) for side, share in shares.items()}
    # A token is clipped from one side only, as the sign of its advantage says.
    found["clip_ratio/region_mean"] = torch.stack(list(shares.values())).sum(dim=0).repeat_interleave(lengths)
    extremes = {"low": "min", "high": "max"}
    return found | {f"clip_ratio/{side}_{extremes[side]}": share for side, share in shares.items()}


def length_metrics(lengths: Sequence[int], stopped: Sequence[bool]) -> dict[str, Float[Tensor, " 1"]]:
    """Return ``completions/*`` of one rollout, one value each.

    Args:
        lengths: Tokens of each completion, its stop token included.
        stopped: Whether it ended with a stop token.
    """
    every = torch.tensor(lengths, dtype=torch.float64)
    ended = every[torch.tensor(stopped)]
    ended = ended if ended.numel() else torch.zeros(1, dtype=torch.float64)  # as TRL, where none has stopped
    values = {"clipped_ratio": 1 - torch.tensor(stopped, dtype=torch.float64).mean()}
    for part, found in {"": every, "terminated_": ended}.items():
        values |= {
            f"mean_{part}length": found.mean(),
            f"min_{part}length": found.min(),
            f"max_{part}length": found.max(),
        }
    return {f"completions/{name}": value[None] for name, value in values.items()}


def reward_metrics(
    rewards: Float[Tensor, "P G"], parts: Mapping[str, Sequence[float | None]]
) -> dict[str, Float[Tensor, " 1"]]:
    """Return ``frac_reward_zero_std`` and ``rewards/NAME/*`` of one rollout, one value each.

    Args:
        rewards: Rewards of G completions per prompt.
        parts: Values of each reward before transforms and weights, by name; None where it does not apply.
    """
    deviation = rewards.double().std(dim=1) if rewards.shape[1] > 1 else torch.zeros(len(rewards), dtype=torch.float64)
    found = {"frac_reward_zero_std": torch.isclose(deviation, torch.zeros_like(deviation)).double().mean()}
    for name, given in parts.items():
        values = torch.tensor([value for value in given if value is not None], dtype=torch.float64)
        if values.numel():
            found[f"rewards/{name}/mean"] = values.mean()
        if values.numel() > 1:
            found[f"rewards/{name}/std"] = values.std()
    return {name: value[None] for name, value in found.items()}


def sampling_metrics(log_ratio: Float[Tensor, " M"]) -> dict[str, Float[Tensor, " M"]]:
    """Return ``sampling/sampling_logp_difference/*``, one value per token; the largest is logged as such.

    Args:
        log_ratio: ``log π - log π_sampler`` of each sampled token, before the first update.
    """
    gap = log_ratio.detach().abs()
    return {f"sampling/sampling_logp_difference/{kind}": gap for kind in ("mean", "max")}


def correction_metrics(weights: Float[Tensor, " M"]) -> dict[str, Float[Tensor, " 1"]]:
    """Return ``sampling/importance_sampling_ratio/*`` of one rollout, one value each.

    Args:
        weights: ``π/π_sampler`` of tokens or of whole completions, truncated.
    """
    found = {"min": weights.min(), "mean": weights.mean(), "max": weights.max()}
    return {f"sampling/importance_sampling_ratio/{kind}": value[None] for kind, value in found.items()}


@torch.no_grad()
def kl_to_reference(batch: CompletionBatch, counted: Bool[Tensor, "N T"]) -> Float[Tensor, " M"]:
    """Return ``π/π_old · k3`` of each token, TRL's ``kl`` with its default ``use_bias_correction_kl``.

    Args:
        batch: Samples with the reference's log-probabilities.
        counted: The tokens to return.
    """
    k3 = estimators.value_from_policy(divergences.get("reverse_kl"), batch.log_ratio)
    return (k3 * power(batch.importance_log_ratio))[counted]
