"""How a reference follows the policy: as an average over its past, or by jumps to where it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from falign.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["MovingAverage", "PeriodicReset"]

_ROOM = 4  # ranks of the policy's adapter that the average's may have where nothing else is said


@dataclass(frozen=True)
class MovingAverage:
    """``π_ref ← α π + (1-α) π_ref`` in the weights, every so many optimiser steps (TR-DPO's soft update).

    For adapters it is the updates ΔW = B A that are averaged, as the weights of the two models would be. The rank of
    an average of k updates is up to k times theirs; what `rank` has no room for is cut off, the smallest singular
    values first, and logged as ``reference/truncation``.

    Attributes:
        alpha: α, the weight of the policy, above 0 and at most 1.
        every: Optimiser steps between two moves.
        rank: Of the averaged adapter; four times the policy's where None. Not read without an adapter.

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

    def add_adapter(self, policy_model: PeftModel, name: str) -> None:
        """Add the adapter that will follow the policy's, equal to it for now."""
        from falign.models.adapter_copies import add_average
        from falign.models.structure import lora_layers

        own = max(layer.r["default"] for layer in lora_layers(policy_model, "default").values())
        add_average(policy_model, rank=_ROOM * own if self.rank is None else self.rank, name=name)

    def move_adapter(self, policy_model: PeftModel, name: str) -> dict[str, float]:
        """Move it, and return metrics."""
        from falign.models.adapter_copies import average_into

        return {"reference/truncation": average_into(policy_model, alpha=self.alpha, name=name)}

    @torch.no_grad()
    def move_weights(self, reference_model: nn.Module, policy_model: nn.Module) -> dict[str, float]:
        """Move a whole model, and return metrics."""
        for name, (old, new) in _pairs(reference_model, policy_model).items():
            if old.dtype in (torch.bfloat16, torch.float16):
                raise ModelError(
                    f"{name} of the reference is {str(old.dtype).removeprefix('torch.')}, where most moves are below "
                    "rounding and lost: load it in float32."
                )
            old.lerp_(new.to(old), self.alpha)
        return {}


@dataclass(frozen=True)
class PeriodicReset:
    """``π_ref ← π``, every so many optimiser steps (TR-DPO's hard update; ProRL's reset).

    Attributes:
        every: Optimiser steps between two resets.
        reset_optimizer: Also forget the optimiser's moments, as ProRL does.

    Source:
        Gorbatovski et al., TR-DPO (arXiv:2404.09656), hard update. Liu et al., ProRL (arXiv:2505.24864), which
        resets when validation stalls, and here it is at a fixed interval.
    """

    kind: ClassVar[str] = "periodic_reset"
    every: int
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        _check_every(self.every)

    def add_adapter(self, policy_model: PeftModel, name: str) -> None:
        """Add the adapter that will be set to the policy's, equal to it for now."""
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


def _check_every(every: int) -> None:
    if every < 1:
        raise ValueError(f"every={every}: the reference moves every so many optimiser steps; give at least 1.")


def _pairs(reference_model: nn.Module, policy_model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    old, new = dict(reference_model.named_parameters()), dict(policy_model.named_parameters())
    if differing := sorted(old.keys() ^ new.keys()):
        raise ModelError(
            f"Policy and reference are not the same model, only one of them has {differing[0]}: the reference cannot "
            "follow."
        )
    return {name: (old[name], new[name]) for name in old}
