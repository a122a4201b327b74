"""What lies between the law that sampled and the policy that learns: measured at every rollout, corrected if asked."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from falign.errors import EngineError

__all__ = ["Corrected", "correct", "gap_metrics", "require_gap"]

_LOG_2 = math.log(2)


class Corrected(NamedTuple):
    """Log-probabilities that make ``π/π_old`` the bounded weight of the sampler's distribution.

    Attributes:
        old_logprobs: ``log π_old``, float64, shape (N, T); 0 where masked.
        cut: 1 for each weight that was above the bound, else 0.
    """

    old_logprobs: Float[Tensor, "N T"]
    cut: Float[Tensor, " M"]


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


def correct(
    policy_logprobs: Float[Tensor, "N T"],
    sampler_logprobs: Float[Tensor, "N T"],
    completion_mask: Bool[Tensor, "N T"],
    *,
    importance: Literal["sequence", "token"],
    cap: float,
) -> Corrected:
    """Put the sampler's distribution in the place of π_old, as far as weights stay below a bound.

    With π the policy before the first update and μ the sampler, ``log π_old = max(log μ, log π - log cap)`` at each
    token, so that ``π/π_old = min(π/μ, cap)``; for whole completions the same holds of the sum over tokens.

    Args:
        policy_logprobs: log π.
        sampler_logprobs: log μ.
        completion_mask: True on completion tokens.
        importance: What a weight is of.
        cap: The bound, at least 1.

    Source:
        Truncated importance sampling: Ionides, J. Comput. Graph. Stat. 17 (2008) 295.
    """
    sampler = sampler_logprobs.double()
    log_weight = (policy_logprobs.double() - sampler).masked_fill(~completion_mask, 0.0)
    if importance == "token":
        excess = (log_weight - math.log(cap)).clamp(min=0)
        cut = excess[completion_mask] > 0
    else:
        whole = (log_weight.sum(dim=-1) - math.log(cap)).clamp(min=0)
        cut = whole > 0
        excess = (whole / completion_mask.sum(dim=-1))[:, None]
    return Corrected((sampler + excess).masked_fill(~completion_mask, 0.0), cut.double())
