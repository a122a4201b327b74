"""References that follow the policy: an average over its past, or a copy renewed at intervals."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from typing_extensions import override

from falign.errors import ModelError
from falign.objectives import TokenWeighting
from falign.references.adapters import AdapterReference
from falign.references.base import MovingRule, Reference
from falign.references.frozen_model import FrozenModel
from falign.scoring import DEFAULT_CHUNK_TOKENS, CompletionStates, TokenBatch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

__all__ = ["CopyRule", "MovingAverage", "MovingReference", "PeriodicReset"]

_FILE = "reference.safetensors"
_ROOM = 4  # default rank of the average's adapter, as a multiple of the policy's


@dataclass(frozen=True)
class MovingAverage:
    """``π_ref ← α π + (1-α) π_ref`` in the weights, every `every` optimizer steps (TR-DPO's soft update).

    For adapters the updates ΔW = B A are averaged, which equals averaging the weights of the two models. The average
    of k updates has up to k times their rank; singular values beyond `rank` are dropped, the smallest first, and the
    loss is logged as ``reference/truncation``.

    Attributes:
        alpha: α, the weight of the policy, above 0 and at most 1.
        every: Optimizer steps between two moves.
        rank: Rank of the averaged adapter; None means four times the policy's. Ignored without an adapter.

    Source:
        Gorbatovski et al., TR-DPO (arXiv:2404.09656), soft update.
    """

    kind: ClassVar[str] = "moving_average"
    alpha: float
    every: int
    rank: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is the policy's share: give a number above 0 and at most 1.")
        _check_every(self.every)

    @property
    def reset_optimizer(self) -> bool:
        """False, because one move changes little."""
        return False

    def add_adapter(self, policy_model: PeftModel, name: str) -> None:
        """Add the adapter that will follow the policy's, initially equal to it."""
        from falign.models.adapter_copies import add_average
        from falign.models.structure import lora_layers

        own = max(layer.r["default"] for layer in lora_layers(policy_model, "default").values())
        add_average(policy_model, rank=_ROOM * own if self.rank is None else self.rank, name=name)

    def move_adapter(self, policy_model: PeftModel, name: str) -> dict[str, float]:
        """Move it, and return metrics."""
        from falign.models.adapter_copies import average_into

        return {"truncation": average_into(policy_model, alpha=self.alpha, name=name)}

    @torch.no_grad()
    def move_weights(self, reference_model: nn.Module, policy_model: nn.Module) -> dict[str, float]:
        """Move a whole model, and return metrics."""
        for name, (old, new) in _pairs(reference_model, policy_model).items():
            if old.dtype in (torch.bfloat16, torch.float16):
                raise ModelError(
                    f"{name} of the reference is {str(old.dtype).removeprefix('torch.')}, where most moves are smaller "
                    "than rounding and are lost: load it in float32."
                )
            old.lerp_(new.to(old), self.alpha)
        return {}


class CopyRule:
    """How a reference becomes a copy of the policy; a base of the rules that say when."""

    def add_adapter(self, policy_model: PeftModel, name: str) -> None:
        """Add the adapter that will be set to the policy's, initially equal to it."""
        from falign.models.adapter_copies import add_copy

        add_copy(policy_model, name=name)

    def move_adapter(self, policy_model: PeftModel, name: str) -> dict[str, float]:
        """Set it to the policy's, bit for bit, and return metrics."""
        from falign.models.adapter_copies import copy_into

        copy_into(policy_model, name=name)
        return {}

    @torch.no_grad()
    def move_weights(self, reference_model: nn.Module, policy_model: nn.Module) -> dict[str, float]:
        """Set a whole model to the policy, and return metrics."""
        for old, new in _pairs(reference_model, policy_model).values():
            old.copy_(new)
        return {}


@dataclass(frozen=True)
class PeriodicReset(CopyRule):
    """``π_ref ← π``, every `every` optimizer steps (TR-DPO's hard update; ProRL's reset).

    Attributes:
        every: Optimizer steps between two resets.
        reset_optimizer: Also clear the optimizer's moments, as ProRL does.

    Source:
        Gorbatovski et al., TR-DPO (arXiv:2404.09656), hard update. Liu et al., ProRL (arXiv:2505.24864), which
        resets when validation stalls: see :class:`ResetOnStall`.
    """

    kind: ClassVar[str] = "periodic_reset"
    every: int
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        _check_every(self.every)


class MovingReference(Reference):
    """A reference that a rule moves toward the policy between optimizer steps; its log-probs cannot be cached.

    Call `move` before each step: it moves every ``rule.every`` steps. Call `follow` to move at once.

    Args:
        held: The reference between moves: an adapter that the rule added to the policy (see `beside`), or a separate
            model.
        rule: The rule by which it moves.

    Example:
        ``MovingReference.beside(model, rule=MovingAverage(alpha=0.6, every=64))``
    """

    starts_as_policy = True
    moves = True
    cannot_shard = "the reference moves by arithmetic on whole matrices, but each process holds only a part of them"

    def __init__(self, held: AdapterReference | FrozenModel, *, rule: MovingRule) -> None:
        self.held = held
        self.rule = rule
        self.every = rule.every
        self.num_moves = 0
        self.start = held.identity()["weights"]
        self.config = held.identity().get("config")
        self._measured: dict[str, float] = {}

    @classmethod
    def beside(
        cls,
        policy_model: PeftModel,
        *,
        rule: MovingRule,
        adapter: str = "ref",
        weights: str | None = None,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    ) -> MovingReference:
        """Return a reference in a separate adapter on the policy's base, initially equal to the policy's.

        Args:
            policy_model: The policy; its trained adapter is ``default``.
            rule: The rule by which the reference moves.
            adapter: The name of the reference's adapter.
            weights: Content hash of the policy's current weights, for the record.
            chunk_tokens: Number of positions that reach the head at once.
        """
        rule.add_adapter(policy_model, adapter)
        held = AdapterReference(adapter=adapter, weights=weights, chunk_tokens=chunk_tokens)
        return cls(held, rule=rule)

    @property
    @override
    def own_model(self) -> nn.Module | None:
        return self.held.own_model

    @override
    def identity(self) -> dict[str, Any]:
        return {
            "kind": self.rule.kind,
            **asdict(self.rule),  # pyright: ignore[reportArgumentType] - a frozen dataclass
            "start": self.start,
            "config": self.config,
            "moves": self.num_moves,
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

    @override
    def move(self, policy_model: nn.Module, step: int, optimizer: Any) -> None:
        if step == 0 or step % self.rule.every:
            return
        self.follow(policy_model)
        if self.rule.reset_optimizer:
            optimizer.state.clear()

    def follow(self, policy_model: nn.Module) -> None:
        """Move once toward the current policy."""
        self._measured = self.held.follow(policy_model, self.rule)
        self.num_moves += 1

    @override
    def metrics(self) -> dict[str, float]:
        return {"moves": float(self.num_moves), **self._measured}

    @override
    def save(self, folder: Path, policy_model: nn.Module) -> None:
        from falign.models.staging import save_tensors

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.held.tensors(policy_model).items()}
        measured = json.dumps(self._measured)
        metadata = {"format": "pt", "moves": str(self.num_moves), "start": self.start or "", "measured": measured}
        save_tensors(tensors, folder / _FILE, metadata=metadata)

    @override
    @torch.no_grad()
    def load(self, folder: Path, policy_model: nn.Module) -> None:
        tensors = self.held.tensors(policy_model)
        with safe_open(folder / _FILE, framework="pt") as file:
            if set(file.keys()) != tensors.keys():
                stray = sorted(set(file.keys()) ^ tensors.keys())[0]
                raise ModelError(f"{folder / _FILE} is of another reference, only one of them has {stray}.")
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
            metadata = file.metadata()
            self.num_moves, self.start = int(metadata["moves"]), metadata["start"] or None
            # Older files use the logged names of the metrics.
            measured = json.loads(metadata["measured"])
            self._measured = {name.removeprefix("reference/"): value for name, value in measured.items()}


def _check_every(every: int) -> None:
    if every < 1:
        raise ValueError(f"every={every}: the number of optimizer steps between two moves must be at least 1.")


def _pairs(reference_model: nn.Module, policy_model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    old, new = dict(reference_model.named_parameters()), dict(policy_model.named_parameters())
    if differing := sorted(old.keys() ^ new.keys()):
        raise ModelError(
            f"Policy and reference are not the same model, only one of them has {differing[0]}: the reference cannot "
            "follow."
        )
    return {name: (old[name], new[name]) for name in old}
