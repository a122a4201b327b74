"""One sampled completion as a row of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import TypedDict

from falign.training.online.groups import Group

__all__ = ["SampleRow", "sample_identity", "sample_rows"]


class SampleRow(TypedDict):
    """Scores and metadata of one sampled completion; logs are in nats, and sums are over its tokens.

    Attributes:
        place: The row that its prompt came from.
        prompt: Text or turns.
        completion: Its text, without special tokens.
        finish_reason: ``stop``, or ``length`` where it was clipped.
        reward: What it is worth.
        parts: The rewards that this was combined of; None where one does not apply.
        logprob: log π, whatever the completion was sampled from.
        reference_logprob: log π_ref; None without a reference.
        token_divergence: Summed divergence between policy and reference over the whole vocabulary at each token: the
            reverse KL in a completion of the policy, the forward KL in one of the reference.
        num_tokens: Its tokens, the stop token included.
        token_ids: Their ids.
        entropy: Mean entropy of the policy's distribution at its tokens.
    """

    place: str
    prompt: Any
    completion: str
    finish_reason: str
    reward: float
    parts: dict[str, float | None]
    logprob: float
    reference_logprob: float | None
    token_divergence: float | None
    num_tokens: int
    token_ids: list[int]
    entropy: float


def sample_identity(place: str, prompt: Any) -> dict[str, Any]:
    """Return what rows of a prompt have whatever is sampled."""
    return {"place": place, "prompt": prompt}


def sample_rows(group: Group, scores: Sequence[dict[str, Any]]) -> list[SampleRow]:
    """Return the rows of a prompt's completions.

    Args:
        group: The completions and their rewards.
        scores: For each the fields that policy and reference give.
    """
    rows: list[Any] = [
        {
            **sample_identity(group.row.place, group.row.prompt),
            "completion": group.texts[i],
            "finish_reason": rollout.finish_reason,
            "reward": group.rewards[i],
            "parts": {name: values[i] for name, values in group.parts.items()},
            **scores[i],
            "num_tokens": len(rollout.completion_ids),
            "token_ids": list(rollout.completion_ids),
        }
        for i, rollout in enumerate(group.rollouts)
    ]
    return rows
