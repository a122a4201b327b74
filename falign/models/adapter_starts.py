"""The first values of an adapter's matrices: random ones, or factors of the base's own weights."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from falign.choices import require_choice
from falign.errors import ConfigError
from falign.models.adapter_modules import StartedDown, StartedUp
from falign.models.structure import adapter_matrix, lora_layers, without_adapters

__all__ = ["STARTS", "mark_started", "room_for", "start_adapter"]


class Start(NamedTuple):
    """A kind of first values.

    Attributes:
        draw: Returns A of plain LoRA, given its shape and a generator; B is zero. None for factors of the weights.
        peft: PEFT's ``init_lora_weights`` that computes the factors B₀ and A₀ of a weight.
    """

    draw: Callable[[tuple[int, ...], torch.Generator], Tensor] | None = None
    peft: str | None = None


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # The distribution of PEFT and of nn.Linear: uniform on ±1/√fan_in.
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def _gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return nn.init.normal_(torch.empty(shape), std=1 / shape[0], generator=generator)


STARTS = {
    "default": Start(draw=_uniform),
    "gaussian": Start(draw=_gaussian),
    "pissa": Start(peft="pissa"),
    "pissa_niter_4": Start(peft="pissa_niter_4"),
    "pissa_niter_16": Start(peft="pissa_niter_16"),
    "olora": Start(peft="olora"),
}
"""Kinds of first values by PEFT's names (``init_lora_weights``)."""


def room_for(start: str) -> int:
    """Return by how much the rank of the adapter in memory exceeds the trained one: 2 with factors of the weights."""
    require_choice("init_lora_weights", start, [*STARTS])
    return 1 if STARTS[start].peft is None else 2


@torch.no_grad()
def start_adapter(model: PeftModel, start: str, *, seed: int) -> None:
    """Set the matrices of the adapter ``default`` to their first values, with which it changes nothing.

    They depend only on the seed, the shapes and, for PiSSA and OLoRA, the base's weights.

    Args:
        model: The base with a new adapter; with factors of the weights its rank is twice the trained one.
        start: One of :data:`STARTS`.
        seed: Seed of the random numbers.

    Raises:
        ConfigError: The rank exceeds that of a weight.
    """
    kind, generator = STARTS[start], torch.Generator().manual_seed(seed)
    for name, layer in sorted(lora_layers(model, "default").items()):
        down, up = adapter_matrix(layer.lora_A, "default"), adapter_matrix(layer.lora_B, "default")
        if kind.draw is not None:
            down.copy_(kind.draw(tuple(down.shape), generator))
            up.zero_()
            continue
        first_up, first_down = _factors(layer, str(kind.peft), name=name)
        down.copy_(torch.cat([first_down, first_down], dim=0))
        up.copy_(torch.cat([first_up, -first_up], dim=1))
    if kind.peft is not None:
        mark_started(model)
    for layer in lora_layers(model, "default").values():
        if "default" in layer.lora_magnitude_vector:
            magnitudes: Any = layer.lora_magnitude_vector["default"]
            weight = dequantize_module_weight(layer.get_base_layer())
            none = torch.zeros((), device=weight.device)
            magnitudes.weight.copy_(magnitudes.get_weight_norm(weight, none, 1.0))


def mark_started(model: PeftModel, adapter: str = "default") -> None:
    """Make an adapter's matrices, ``[B, -B₀]`` and ``[A; A₀]``, train B and A only."""
    for layer in lora_layers(model, adapter).values():
        layer.lora_A[adapter].__class__, layer.lora_B[adapter].__class__ = StartedDown, StartedUp


def _factors(layer: LoraLayer, kind: str, *, name: str) -> tuple[Tensor, Tensor]:
    """Return B₀ and A₀ of a layer in float32, computed by PEFT on a copy of its weight."""
    base = without_adapters(layer)  # pyright: ignore[reportArgumentType] - also a module
    weight = dequantize_module_weight(base).float()
    weight = weight.T if type(base) is Conv1D else weight  # its 4-bit form is (out, in) already
    rank = layer.r["default"] // 2
    if rank > min(weight.shape):
        raise ConfigError(
            f"r={rank} with init_lora_weights={kind!r}: {name} is {tuple(weight.shape)} and has at most "
            f"{min(weight.shape)} such factors: lower r, or give this layer a lower one in rank_pattern."
        )
    copied = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    copied.weight.data = weight.clone()
    config = LoraConfig(r=rank, lora_alpha=1, init_lora_weights=kind)  # pyright: ignore[reportArgumentType]
    alpha = layer.scaling["default"] * rank
    made = LoraLinear(copied, "default", config=config, r=rank, lora_alpha=alpha)  # pyright: ignore
    return adapter_matrix(made.lora_B, "default"), adapter_matrix(made.lora_A, "default")
