"""What every reference has in common, and the check that it is the right one."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.errors import ModelError
from falign.scoring import (
    DEFAULT_CHUNK_TOKENS,
    CompletionStates,
    TokenBatch,
    Weighting,
    completion_scores,
    completion_states,
    evaluation_mode,
)

__all__ = ["Reference", "check_same_at_start", "detached_logprobs", "detached_states"]


@runtime_checkable
class Reference(Protocol):
    """The distribution π_ref that the policy is held to."""

    def identity(self) -> dict[str, Any]:
        """Return what a run folder records: ``kind``, and ``weights``, their content hash if known."""
        ...

    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        """Return log π_ref of the completion tokens, without gradient and dropout, 0 where masked.

        Args:
            policy_model: The policy, which some references are a part of; it is left as it was.
            batch: The rows to score.

        Returns:
            Log-probabilities in nats, shape (N, T).
        """
        ...

    def states(self, policy_model: nn.Module, batch: TokenBatch, *, weighting: Weighting = "none") -> CompletionStates:
        """Return whole next-token distributions, for objectives that take a divergence over the vocabulary.

        Args:
            policy_model: The policy, which some references are a part of; it is left as it was.
            batch: The rows to score.
            weighting: Also return weights of tokens (see :func:`falign.scoring.completion_states`).

        Returns:
            What predicts each completion token, without gradient and dropout.
        """
        ...


def detached_logprobs(
    model: nn.Module, batch: TokenBatch, *, chunk_tokens: int = DEFAULT_CHUNK_TOKENS
) -> Float[Tensor, "N T"]:
    """Return the log-probabilities of a model at rest: no gradient, no dropout, modes restored afterwards.

    Args:
        model: The model to score with.
        batch: The rows to score.
        chunk_tokens: How many positions reach the head at once.

    Returns:
        Log-probabilities in nats, shape (N, T), 0 where masked.
    """
    with torch.no_grad(), evaluation_mode(model):
        return completion_scores(model, batch, chunk_tokens=chunk_tokens).logprobs


def detached_states(model: nn.Module, batch: TokenBatch, *, weighting: Weighting = "none") -> CompletionStates:
    """Return the next-token distributions of a model at rest: no gradient, no dropout, modes restored afterwards.

    Args:
        model: The model to score with.
        batch: The rows to score.
        weighting: Also return weights of tokens.

    Returns:
        The states at the positions that predict completion tokens.
    """
    with torch.no_grad(), evaluation_mode(model):
        return completion_states(model, batch, weighting=weighting)


def check_same_at_start(
    policy_model: nn.Module, reference: Reference, batch: TokenBatch, *, tolerance: float = 1e-5
) -> None:
    """Refuse a reference that differs from the untrained policy, where the two should be the same model.

    Args:
        policy_model: The policy before its first update.
        reference: The reference that it starts from.
        batch: Any rows.
        tolerance: Largest difference of a token's log-probability, nats. In 16-bit models, scores cached from
            batches of another width need more.

    Raises:
        ModelError: If a difference is larger, or is not a number.
    """
    policy_logprobs = detached_logprobs(policy_model, batch)
    difference = (policy_logprobs - reference.logprobs(policy_model, batch)).abs()
    # argmax takes nan for the largest, and the comparison is written so that nan fails.
    row, token = divmod(int(difference.argmax()), difference.shape[1])
    largest = difference[row, token].item()
    if not largest <= tolerance:
        raise ModelError(
            f"Policy and reference differ by {largest:.3g} nats before training (at most {tolerance:.3g} "
            f"allowed), most at completion token {token} of {batch.place[row] or f'row {row}'}: the "
            f"reference {reference.identity()} is not the model that the policy starts from."
        )
