"""The gap between a sampler's log-probabilities and those of the model that it samples from."""

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
"""Bound of the mean gap per token if both compute in float32, in nats; rounding causes about a hundredth of it."""


class Gap(NamedTuple):
    """Absolute differences of log-probabilities, per token, nats.

    Attributes:
        mean: Mean over all tokens.
        max: Largest difference.
        num_tokens: Number of tokens.
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
    """A test of each version on a few sampled tokens, to see that its weights reached the sampler.

    Args:
        prompt_ids: Long prompts, because short ones leave nothing in a server's cache.
        params: Sampling parameters of the run.
        bound: Largest allowed mean gap per token, nats.
    """

    def __init__(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, bound: float) -> None:
        self.prompt_ids, self.params, self.bound = prompt_ids, params, bound

    def check(self, engine: Engine, model: nn.Module, version: int) -> None:
        """Refuse a version if its samples do not come from the model's distribution.

        Raises:
            EngineError: The mean gap is above the bound; the message has both.
        """
        rollouts = engine.sample(self.prompt_ids, 1, self.params, version=version, seed=0)
        gap = measure_gap(model, rollouts, self.params)
        if not gap.mean <= self.bound:
            raise EngineError(
                f"Version {version}: the sampler's log-probabilities of {gap.num_tokens} tokens are {gap.mean:.2g} "
                f"nats off on average and {gap.max:.2g} at most, and {self.bound:.2g} is allowed on average: it does "
                "not sample these weights. Restart the server and resume by --resume; if the error comes back, see "
                "docs/vllm.md."
            )


@torch.no_grad()
def recomputed_logprobs(model: nn.Module, rollouts: Sequence[Rollout], params: SamplingParams) -> list[list[float]]:
    """Return the model's log-probability of each token, under the distribution that ``params`` make of its logits.

    Args:
        model: The policy, with the weights of the rollouts' version.
        rollouts: Completions; all logits of one of them are in memory at once.
        params: Sampling parameters of the rollouts; the temperature is above 0.
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
