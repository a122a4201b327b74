"""Completions of the reference, whichever kind it is of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from typing_extensions import override

from falign.references import Reference
from falign.rollouts import Engine, EngineCapabilities, Rollout, SamplingParams, TransformersEngine

__all__ = ["ReferenceEngine"]


class ReferenceEngine(Engine):
    """Samples from a reference, which acts for as long as a call lasts and no longer.

    Args:
        reference: What samples.
        policy: The model that some references are a part of.
        pad_token_id: As for :class:`falign.rollouts.TransformersEngine`.
    """

    def __init__(self, reference: Reference, policy: nn.Module, *, pad_token_id: int) -> None:
        self.reference, self.policy, self.pad_token_id = reference, policy, pad_token_id

    @override
    def publish(self, model: nn.Module, version: int) -> None:
        """Do nothing: the reference is what it is."""

    @override
    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        *,
        version: int,
        seed: int | list[int],
        first: int = 0,
    ) -> list[Rollout]:
        with self.reference.acting(self.policy) as model:
            engine = TransformersEngine(model, pad_token_id=self.pad_token_id)
            engine.publish(model, version)
            return engine.sample(prompt_ids, n, params, version=version, seed=seed, first=first)

    @override
    def retire(self, version: int) -> None:
        """Do nothing: the reference is what it is."""

    @override
    def capabilities(self) -> EngineCapabilities:
        with self.reference.acting(self.policy) as model:
            return TransformersEngine(model, pad_token_id=self.pad_token_id).capabilities()

    @override
    def close(self) -> None:
        """Do nothing: whoever made the models keeps them."""
