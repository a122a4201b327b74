"""The interface of a reference, and the check that it is the right one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.errors import ModelError
from falign.scoring import (
    DEFAULT_CHUNK_TOKENS,
    CompletionStates,
    TokenBatch,
    Weighting,
    completion_states,
    detached_scores,
    evaluation_mode,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["REFERENCE", "Reference", "check_same_at_start", "detached_logprobs", "detached_states"]


REFERENCE = "reference"
"""Name of the reference whose log-probabilities are ``reference_logprobs``, and whose activations make token weights;
metrics and evaluation compare with it."""


class Reference(ABC):
    """The distribution π_ref that the policy is held to.

    A fixed reference defines `identity`, `logprobs` and `states`; the other methods have defaults that hold for one
    which is no model of its own and never changes.

    Attributes:
        starts_as_policy: True if it was built to be the policy before the first step, which is then checked.
        moves: True if it changes while the policy is trained. It then goes into checkpoints, and is never cached.
        cannot_shard: Reason why it does not work with weights that are spread over processes (FSDP2); ``""`` where it
            does.
    """

    starts_as_policy: bool = False
    moves: bool = False
    cannot_shard: str = ""

    @property
    def own_model(self) -> nn.Module | None:
        """The second model in memory; None for an adapter in the policy, its absence, or values from disk."""
        return None

    @property
    def can_shard(self) -> bool:
        """True if it works with weights that are spread over processes."""
        return not self.cannot_shard

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what a run folder records: ``kind``, and ``weights``, their content hash if known."""

    @abstractmethod
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        """Return log π_ref of the completion tokens, without gradient and dropout, 0 where masked.

        Args:
            policy_model: The policy, which some references are a part of; it is left as it was.
            batch: The rows to score.

        Returns:
            Log-probabilities in nats, shape (N, T).
        """

    @abstractmethod
    def states(self, policy_model: nn.Module, batch: TokenBatch, *, weighting: Weighting = "none") -> CompletionStates:
        """Return whole next-token distributions, for objectives that take a divergence over the vocabulary.

        Args:
            policy_model: The policy, which some references are a part of; it is left as it was.
            batch: The rows to score.
            weighting: Also return weights of tokens (see :func:`falign.scoring.completion_states`).

        Returns:
            What predicts each completion token, without gradient and dropout.
        """

    def acting(self, policy_model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Return a context with a model that is this reference: its own, or the policy with other adapters on or off.

        Args:
            policy_model: The policy, which some references are a part of; afterwards it is as it was.

        Raises:
            ModelError: The reference is not a model.
        """
        raise ModelError(
            f"A {type(self).__name__} scores completions and cannot write any: define its method acting, or take a "
            "reference that is a model."
        )

    def check_fits(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
        """Check that the reference reads the policy's token ids, and leave further ids out of its distributions.

        Args:
            tokenizer: The policy's.
            vocabulary: Number of ids that the policy's distributions are over.

        Returns:
            Number of ids that both have, the policy's own for a reference that is a part of it.

        Raises:
            ConfigError: With the first token that has another id.
        """
        return vocabulary

    def move(self, policy_model: nn.Module, step: int, optimizer: Any) -> None:  # noqa: B027 - a fixed one stays
        """Follow the policy if it is time to; a fixed reference does nothing.

        Call it when the next step begins, not when one ends, and before anything is sampled or scored for it: what is
        logged, evaluated and saved at a step then belongs to the reference that the step was taken against. Right
        after a reset every log-ratio is zero, and the last step of a run would be measured by nothing.

        Args:
            policy_model: The policy as the last step left it.
            step: Optimizer steps taken so far.
            optimizer: The policy's, whose moments a reset may forget.
        """

    def save(self, folder: Path, policy_model: nn.Module) -> None:  # noqa: B027 - a fixed one has no state
        """Write the state of a reference that moves into an existing folder."""

    def load(self, folder: Path, policy_model: nn.Module) -> None:  # noqa: B027
        """Go on from what `save` wrote.

        Raises:
            ModelError: It is the state of another reference.
        """

    def metrics(self) -> dict[str, float]:
        """Return what is logged of it beside each loss, by names without the reference's own."""
        return {}


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
    return detached_scores(model, batch, chunk_tokens=chunk_tokens).logprobs


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
