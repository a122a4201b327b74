"""What a model says that completions were drawn with, computed anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from falign.rollouts.base import Rollout, SamplingParams
from falign.rollouts.sampling import process_logits
from falign.scoring import PromptTree, completion_states, evaluation_mode, pad

__all__ = ["recomputed_logprobs"]


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
