"""What lies between the law that sampled and the policy that learns: measured at every rollout, corrected if asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from falign.errors import EngineError
from falign.rollouts.scored_trees import ScoredTree

__all__ = ["Corrected", "correct", "gap_metrics", "require_gap"]

_LOG_2 = math.log(2)


class Corrected(NamedTuple):
    """Trees whose ``old_logprobs`` make ``π/π_old`` the bounded weight of the sampler's law.

    Attributes:
        trees: The same completions.
        cut: 1 for each weight that was above the bound, else 0.
    """

    trees: list[ScoredTree]
    cut: Tensor


def gap_metrics(log_ratio: Float[Tensor, " M"]) -> dict[str, Tensor]:
    """Return what is logged of ``log π - log π_sampler`` of sampled tokens.

    Returns:
        ``sampler/logprob_gap`` and ``sampler/logprob_gap_max``, of which mean and largest value are logged, and
        ``sampler/ratio_outside``: whether π/π_sampler is outside [1/2, 2].
    """
    gap = log_ratio.detach().abs()
    return {
        "sampler/logprob_gap": gap,
        "sampler/logprob_gap_max": gap,  # of which the largest is logged
        "sampler/ratio_outside": (gap > _LOG_2).to(gap.dtype),
    }


def require_gap(log_ratio: Float[Tensor, " M"], bound: float, *, step: int) -> None:
    """Refuse samples that are not the policy's.

    Raises:
        EngineError: With the gap.
    """
    gap = log_ratio.detach().abs()
    if not gap.mean() <= bound:
        raise EngineError(
            f"Step {step}: log-probabilities of sampler and trainer differ by {gap.mean():.2g} nats on average over "
            f"{gap.numel()} tokens, {gap.max():.2g} at most, and {bound:.2g} is allowed (rollout.engine.max_gap): the "
            "sampler does not have these weights. Nothing was learnt from these samples; start the server anew and "
            "go on by --resume."
        )


def correct(trees: Sequence[ScoredTree], *, importance: Literal["sequence", "token"], cap: float) -> Corrected:
    """Put the sampler's law in the place of π_old, as far as weights stay below a bound.

    With π the policy before the first update and μ the sampler, ``log π_old = max(log μ, log π - log cap)`` at each
    token, so that ``π/π_old = min(π/μ, cap)``; for whole completions the same holds of the sum over tokens.

    Args:
        trees: Completions with ``old_logprobs`` (log π) and ``sampler_logprobs`` (log μ).
        importance: What a weight is of.
        cap: The bound, at least 1.

    Source:
        Truncated importance sampling: Ionides, J. Comput. Graph. Stat. 17 (2008) 295.
    """
    bound, corrected, cut = math.log(cap), [], []
    for tree in trees:
        rows = []
        for own, sampled in zip(tree.columns["old_logprobs"], tree.columns["sampler_logprobs"], strict=True):
            policy, sampler = torch.tensor(own, dtype=torch.float64), torch.tensor(sampled, dtype=torch.float64)
            log_weight = policy - sampler if importance == "token" else (policy - sampler).sum()[None]
            excess = (log_weight - bound).clamp(min=0)
            cut.append(excess > 0)
            rows.append((sampler + (excess if importance == "token" else excess / len(sampler))).tolist())
        corrected.append(tree.with_columns(old_logprobs=rows))
    return Corrected(corrected, torch.cat(cut).double())
