"""The gap between a sampler's log-probabilities and those of the model that it should sample from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from falign.errors import EngineError
from falign.rollouts.base import Engine, Rollout, SamplingParams
from falign.rollouts.decoding import process_logits
from falign.scoring import PromptTree, completion_states, evaluation_mode, pad

__all__ = ["EXACT", "Canary", "Gap", "measure_gap", "recomputed_logprobs"]

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
    """Return the gap between the log-probabilities that a sampler recorded and those of a model."""
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


@torch.no_grad()
def recomputed_logprobs(model: nn.Module, rollouts: Sequence[Rollout], params: SamplingParams) -> list[list[float]]:
    """Return the log-probability of each token under the distribution that it should have been drawn from.

    Args:
        model: The policy, whose weights are those of the rollouts' version.
        rollouts: Completions; all logits of one of them are held at once.
        params: How they were drawn; the temperature is above 0.
    """
    rows = []
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for rollout in rollouts:
            batch = pad([PromptTree(rollout.prompt_ids, (rollout.completion_ids,))], pad_token_id=0).to(device)
            hidden, head = completion_states(model, batch).distribution
            logits = process_logits(head.logits(head.embeddings(hidden)), params)
            targets = batch.completion_ids[batch.completion_mask]
            rows.append(logits.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0].tolist())
    return rows
