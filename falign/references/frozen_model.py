"""A reference that is a separate, frozen model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from falign.errors import ModelError
from falign.objectives import TokenWeighting
from falign.references.base import MovingRule, Reference, detached_logprobs, detached_states
from falign.scoring import DEFAULT_CHUNK_TOKENS, CompletionStates, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["FrozenModel"]


class FrozenModel(Reference):
    """A second model in memory, frozen on construction.

    Args:
        model: The reference model; put into evaluation mode, its parameters no longer requiring gradients.
        weights: Content hash of its weights, for the record.
        config: Hash of its configuration, for the record.
        tokenizer: Its tokenizer, to compare with the policy's; None if they have been compared.
        starts_as_policy: True if it is the model that the policy starts from.
        chunk_tokens: Number of positions that reach the head at once.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: str | None = None,
        config: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        starts_as_policy: bool = False,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.weights = weights
        self.config = config
        self.tokenizer = tokenizer
        self.starts_as_policy = starts_as_policy
        self.chunk_tokens = chunk_tokens

    @property
    @override
    def own_model(self) -> nn.Module:
        return self.model

    @override
    def identity(self) -> dict[str, Any]:
        return {"kind": "frozen_model", "weights": self.weights, "config": self.config}

    @override
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        self._refuse_policy(policy_model)
        return detached_logprobs(self.model, batch, chunk_tokens=self.chunk_tokens)

    @override
    def states(
        self, policy_model: nn.Module, batch: TokenBatch, *, weighting: TokenWeighting = "none"
    ) -> CompletionStates:
        self._refuse_policy(policy_model)
        return detached_states(self.model, batch, weighting=weighting)

    @override
    @contextmanager
    def acting(self, policy_model: nn.Module) -> Iterator[nn.Module]:
        yield self.model

    @override
    def check_fits(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
        from falign.models.heads import cut_head
        from falign.models.tokenizers import check_same_tokens

        # Without it, the tokens have been compared already.
        if self.tokenizer is not None:
            check_same_tokens(tokenizer, self.tokenizer, "The policy and its reference")
        return cut_head(cast("PreTrainedModel", self.model), vocabulary)

    def follow(self, policy_model: nn.Module, rule: MovingRule) -> dict[str, float]:
        """Move the weights toward the policy's by a rule, and return metrics of the move."""
        return rule.move_weights(self.model, policy_model)

    def tensors(self, policy_model: nn.Module) -> dict[str, Tensor]:
        """Return the weights (no copies), by name."""
        return dict(self.model.named_parameters())

    def _refuse_policy(self, policy_model: nn.Module) -> None:
        if policy_model is self.model:
            raise ModelError(
                "Policy and frozen reference are the same object, so the policy is frozen too: load the reference "
                "separately, or copy it before training."
            )
