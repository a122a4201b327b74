"""A reference that follows the policy."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from typing_extensions import override

from falign.errors import ModelError
from falign.references.adapter_reference import AdapterReference
from falign.references.base import Reference
from falign.references.frozen_model import FrozenModel
from falign.references.moving_rules import MovingAverage, PeriodicReset
from falign.scoring import DEFAULT_CHUNK_TOKENS, CompletionStates, TokenBatch, Weighting

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["MovingReference"]

_FILE = "reference.safetensors"


class MovingReference(Reference):
    """A reference that a rule moves towards the policy between optimizer steps; its log-probs cannot be cached.

    Call `move` after every ``rule.every`` steps, or let :class:`falign.training.AlignmentTrainer` do it.

    Args:
        held: The reference between two moves: an adapter in the policy that the rule added (see `beside`), or
            a model of its own.
        rule: How it moves.

    Example:
        ``MovingReference.beside(model, rule=MovingAverage(alpha=0.6, every=64))``
    """

    def __init__(self, held: AdapterReference | FrozenModel, *, rule: MovingAverage | PeriodicReset) -> None:
        self.held = held
        self.rule = rule
        self.moves = 0
        self.start = held.identity()["weights"]
        self.config = held.identity().get("config")
        self._measured: dict[str, float] = {}

    @classmethod
    def beside(
        cls,
        policy_model: PeftModel,
        *,
        rule: MovingAverage | PeriodicReset,
        adapter: str = "ref",
        weights: str | None = None,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    ) -> MovingReference:
        """Return a reference in an adapter of its own over the policy's base, equal to the policy's for now.

        Args:
            policy_model: The policy; its trained adapter is ``default``.
            rule: How the reference moves.
            adapter: The name of the reference's adapter.
            weights: Content hash of what the policy is now, for the record.
            chunk_tokens: How many positions reach the head at once.
        """
        rule.add_adapter(policy_model, adapter)
        held = AdapterReference(adapter=adapter, weights=weights, chunk_tokens=chunk_tokens)
        return cls(held, rule=rule)

    @override
    def identity(self) -> dict[str, Any]:
        return {
            "kind": self.rule.kind,
            **asdict(self.rule),
            "start": self.start,
            "config": self.config,
            "moves": self.moves,
        }

    @override
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        return self.held.logprobs(policy_model, batch)

    @override
    def states(self, policy_model: nn.Module, batch: TokenBatch, *, weighting: Weighting = "none") -> CompletionStates:
        return self.held.states(policy_model, batch, weighting=weighting)

    def move(self, policy_model: nn.Module) -> None:
        """Move once towards the policy as it is now."""
        if isinstance(self.held, FrozenModel):
            self._measured = self.rule.move_weights(self.held.model, policy_model)
        else:
            self._measured = self.rule.move_adapter(cast("PeftModel", policy_model), self.held.adapter)
        self.moves += 1

    def metrics(self) -> dict[str, float]:
        """Return metrics: the number of moves, and the measurements of the last one."""
        return {"reference/moves": float(self.moves), **self._measured}

    def save(self, folder: Path, policy_model: nn.Module) -> None:
        """Write the reference as it is now into an existing folder."""
        from falign.models.tensor_file import save_tensors

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors(policy_model).items()}
        measured = json.dumps(self._measured)
        metadata = {"format": "pt", "moves": str(self.moves), "start": self.start or "", "measured": measured}
        save_tensors(tensors, folder / _FILE, metadata=metadata)

    @torch.no_grad()
    def load(self, folder: Path, policy_model: nn.Module) -> None:
        """Go on from what `save` wrote.

        Raises:
            ModelError: It is of another model.
        """
        tensors = self._tensors(policy_model)
        with safe_open(folder / _FILE, framework="pt") as file:
            if set(file.keys()) != tensors.keys():
                stray = sorted(set(file.keys()) ^ tensors.keys())[0]
                raise ModelError(f"{folder / _FILE} is of another reference, only one of them has {stray}.")
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
            metadata = file.metadata()
            self.moves, self.start = int(metadata["moves"]), metadata["start"] or None
            self._measured = json.loads(metadata["measured"])

    def _tensors(self, policy_model: nn.Module) -> dict[str, Tensor]:
        if isinstance(self.held, FrozenModel):
            return dict(self.held.model.named_parameters())
        from falign.models.adapter_copies import matrices_of

        return matrices_of(cast("PeftModel", policy_model), self.held.adapter)
