"""How far a sampler's log-probabilities are from those of the model that it should sample from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from falign.errors import EngineError
from falign.rollouts.base import Engine, Rollout, SamplingParams
from falign.rollouts.recompute import recomputed_logprobs

__all__ = ["EXACT", "Canary", "Gap", "measure_gap"]

EXACT = 1e-3
"""Bound of the mean gap per token where both compute in float32, in nats: rounding is a hundredth of it."""


class Gap(NamedTuple):
    """Absolute differences of log-probabilities, per token, nats.

    Attributes:
        mean: Over all tokens.
        max: The largest.
        num_tokens: How many there are.
    """

    mean: float
    max: float
    num_tokens: int


def measure_gap(model: nn.Module, rollouts: Sequence[Rollout], params: SamplingParams) -> Gap:
    """Return how far what the sampler said of its tokens is from what a model says of them."""
    gaps = [
        abs(said - is_)
        for rollout, row in zip(rollouts, recomputed_logprobs(model, rollouts, params), strict=True)
        for said, is_ in zip(rollout.logprobs, row, strict=True)
    ]
    return Gap(sum(gaps) / len(gaps), max(gaps), len(gaps))


class Canary:
    """A few tokens that are sampled of each version, to see that it arrived.

    Args:
        prompt_ids: Prompts, long ones: only these leave anything in a server's cache.
        params: How the run samples.
        bound: Of the mean gap per token, nats.
    """

    def __init__(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, bound: float) -> None:
        self.prompt_ids, self.params, self.bound = prompt_ids, params, bound

    def check(self, engine: Engine, model: nn.Module, version: int) -> None:
        """Refuse a version whose samples are not the model's.

        Raises:
            EngineError: With the gap.
        """
        rollouts = engine.sample(self.prompt_ids, 1, self.params, version=version, seed=0)
        gap = measure_gap(model, rollouts, self.params)
        if not gap.mean <= self.bound:
            raise EngineError(
                f"Version {version}: what the sampler says of {gap.num_tokens} tokens is {gap.mean:.2g} nats off on "
                f"average, at most {gap.max:.2g}, and {self.bound:.2g} is allowed: it does not sample these weights. "
                "Start the server anew and go on by --resume; if it comes back, look at docs/vllm.md."
            )
