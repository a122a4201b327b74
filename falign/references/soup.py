"""A weighted average of fine-tuned models as reference, as in SALSA."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from falign.objectives import TokenWeighting
from falign.references.adapters import AdapterReference
from falign.references.base import Reference
from falign.references.frozen_model import FrozenModel
from falign.scoring import DEFAULT_CHUNK_TOKENS, CompletionStates, TokenBatch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

__all__ = ["Soup"]


class Soup(Reference):
    """The model with ``θ = Σ w_i θ_i``; exact for adapters over one base, which may be 4-bit.

    Args:
        held: The average: an adapter in the policy, or a separate model.
        record: Its members, as in ``soup.json``.

    Source:
        Chegini et al., SALSA (arXiv:2411.01798), which averages two models from one parent.
    """

    def __init__(self, held: AdapterReference | FrozenModel, *, record: dict[str, Any]) -> None:
        self.held = held
        self.record = record

    @classmethod
    def of_adapters(
        cls,
        policy_model: PeftModel,
        paths: Sequence[str | Path],
        *,
        weights: Sequence[float] | None = None,
        adapter: str = "ref",
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    ) -> Soup:
        """Return the soup of adapters over the policy's base, held in an adapter next to the policy's.

        Args:
            policy_model: The policy.
            paths: Folders of adapters, or of runs that trained adapters.
            weights: One share per path, summing to 1; equal shares by default.
            adapter: The name of the soup's adapter.
            chunk_tokens: Number of positions that reach the head at once.

        Raises:
            ConfigError: The weights are not shares that sum to 1.
            ModelError: The adapters cannot be averaged, or belong to another base.
        """
        from falign.models.adapter_soup import adapter_soup
        from falign.models.adapter_tensors import install_adapter
        from falign.models.identity import adapted_weights_hash
        from falign.models.recorded_base import check_recorded_base
        from falign.models.soup import soup_record
        from falign.models.soup_members import soup_members

        members = soup_members(paths, weights)
        average = adapter_soup(members)
        check_recorded_base(average.base, policy_model, members[0].folder)
        install_adapter(policy_model, average, name=adapter)
        combined = adapted_weights_hash(policy_model, adapter=adapter)
        held = AdapterReference(adapter=adapter, weights=combined, chunk_tokens=chunk_tokens)
        return cls(held, record=soup_record(members))

    @property
    @override
    def own_model(self) -> nn.Module | None:
        return self.held.own_model

    @override
    def identity(self) -> dict[str, Any]:
        held = self.held.identity()
        return {
            "kind": "soup",
            "weights": held["weights"],
            "config": held.get("config"),
            "members": self.record["members"],
        }

    @override
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        return self.held.logprobs(policy_model, batch)

    @override
    def states(
        self, policy_model: nn.Module, batch: TokenBatch, *, weighting: TokenWeighting = "none"
    ) -> CompletionStates:
        return self.held.states(policy_model, batch, weighting=weighting)

    @override
    def acting(self, policy_model: nn.Module) -> AbstractContextManager[nn.Module]:
        return self.held.acting(policy_model)

    @override
    def check_fits(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
        return self.held.check_fits(tokenizer, vocabulary)
