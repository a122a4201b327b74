"""A model of its own that never changes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from falign.errors import ModelError
from falign.references.base import Reference, detached_logprobs, detached_states
from falign.scoring import DEFAULT_CHUNK_TOKENS, CompletionStates, TokenBatch, Weighting

__all__ = ["FrozenModel"]


class FrozenModel(Reference):
    """A second model in memory, frozen on construction.

    Args:
        model: The reference model; put into evaluation mode, its parameters no longer requiring gradients.
        weights: Content hash of its weights, for the record.
        config: Hash of its configuration, for the record.
        chunk_tokens: How many positions reach the head at once.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: str | None = None,
        config: str | None = None,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.weights = weights
        self.config = config
        self.chunk_tokens = chunk_tokens

    @override
    def identity(self) -> dict[str, Any]:
        return {"kind": "frozen_model", "weights": self.weights, "config": self.config}

    @override
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        self._refuse_policy(policy_model)
        return detached_logprobs(self.model, batch, chunk_tokens=self.chunk_tokens)

    @override
    def states(self, policy_model: nn.Module, batch: TokenBatch, *, weighting: Weighting = "none") -> CompletionStates:
        self._refuse_policy(policy_model)
        return detached_states(self.model, batch, weighting=weighting)

    def _refuse_policy(self, policy_model: nn.Module) -> None:
        if policy_model is self.model:
            raise ModelError(
                "Policy and frozen reference are one object, so the policy is frozen too: load the reference "
                "separately, or copy it before training."
            )
