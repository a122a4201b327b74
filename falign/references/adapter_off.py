"""The policy with its adapter off: a reference that costs no second model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from falign.errors import ModelError
from falign.references.adapter_state import refuse_trained_base, trainable_as_before
from falign.references.base import Reference, detached_logprobs, detached_states
from falign.scoring import DEFAULT_CHUNK_TOKENS, Adapted, CompletionStates, Head, TokenBatch, Weighting

__all__ = ["AdapterOff", "adapter_off"]


@dataclass(frozen=True, kw_only=True)
class AdapterOff(Reference):
    """The model under the policy's adapters. All of them are off, also a frozen one from supervised tuning.

    Attributes:
        weights: Content hash of the weights under the adapters, for the record.
        chunk_tokens: How many positions reach the head at once.
    """

    weights: str | None = None
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS

    @override
    def identity(self) -> dict[str, Any]:
        return {"kind": "adapter_off", "weights": self.weights}

    @override
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        with adapter_off(policy_model):
            return detached_logprobs(policy_model, batch, chunk_tokens=self.chunk_tokens)

    @override
    def states(self, policy_model: nn.Module, batch: TokenBatch, *, weighting: Weighting = "none") -> CompletionStates:
        with adapter_off(policy_model):
            states = detached_states(policy_model, batch, weighting=weighting)
        # The head is applied later, when the adapter is on again.
        head = _without_adapter(states.distribution.head)
        return states._replace(distribution=states.distribution._replace(head=head))


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Let a model act without its adapter for a while."""
    if not isinstance(model, Adapted):
        raise ModelError(
            f"{type(model).__name__} has no adapter to switch off, so the policy would be its own "
            "reference: train a LoRA adapter (peft.get_peft_model), or take a frozen model as reference."
        )
    from falign.models.base_weights import check_base_intact

    check_base_intact(model)
    with trainable_as_before(model), model.disable_adapter():
        refuse_trained_base(model)
        yield


def _without_adapter(head: Head) -> Head:
    from falign.models.structure import without_adapters

    assert isinstance(head.embeddings, nn.Module)
    return replace(head, embeddings=without_adapters(head.embeddings))
