"""Another adapter over the policy's base, such as the one from supervised tuning, as reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from falign.references.adapter_state import adapter_acting, refuse_trained_base, require_adapter
from falign.references.base import Reference, detached_logprobs, detached_states
from falign.scoring import (
    DEFAULT_CHUNK_TOKENS,
    CompletionStates,
    Head,
    TokenBatch,
    Weighting,
    evaluation_mode,
)

__all__ = ["AdapterReference"]


@dataclass(frozen=True, kw_only=True)
class AdapterReference(Reference):
    """The policy's base under a frozen adapter that lies beside the trained one.

    Attributes:
        adapter: The adapter's name in the policy. ``ref`` is the one that is never exported.
        weights: Content hash of the base and the adapter, for the record.
        path: Where the adapter was loaded from, for the record.
        chunk_tokens: How many positions reach the head at once.
    """

    adapter: str = "ref"
    weights: str | None = None
    path: str | None = None
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS

    @override
    def identity(self) -> dict[str, Any]:
        return {"kind": "adapter", "path": self.path, "weights": self.weights}

    @override
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        with self.acting(policy_model):
            return detached_logprobs(policy_model, batch, chunk_tokens=self.chunk_tokens)

    @override
    def states(self, policy_model: nn.Module, batch: TokenBatch, *, weighting: Weighting = "none") -> CompletionStates:
        with self.acting(policy_model):
            states = detached_states(policy_model, batch, weighting=weighting)
        # The head is applied later, when the policy's adapter acts again.
        head = states.distribution.head
        head = replace(head, embeddings=_HeadUnder(head, self.adapter))
        return states._replace(distribution=states.distribution._replace(head=head))

    @contextmanager
    def acting(self, policy_model: nn.Module) -> Iterator[None]:
        """Let the policy act as the reference for a while."""
        from falign.models.base_weights import check_base_intact

        check_base_intact(policy_model)
        require_adapter(policy_model, self.adapter)
        with adapter_acting(policy_model, self.adapter):
            refuse_trained_base(policy_model)
            yield


@dataclass(frozen=True)
class _HeadUnder:
    """A head under one adapter, whichever adapter acts when it is called."""

    head: Head
    adapter: str

    def __call__(self, hidden: Tensor) -> Tensor:
        layer = self.head.embeddings
        assert isinstance(layer, nn.Module)
        with adapter_acting(layer, self.adapter), evaluation_mode(layer):
            return layer(hidden)
