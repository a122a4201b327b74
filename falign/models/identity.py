"""A content hash of weights: equal for equal weights, whoever loaded them."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from falign.errors import ModelError
from falign.models.structure import base_of

__all__ = ["adapted_weights_hash", "weights_hash"]


def weights_hash(model: PreTrainedModel | PeftModel, *, adapter: str | None = None) -> str:
    """Return the SHA-256 of the base weights, adapters excluded, or of one adapter.

    Names, shapes, types and bytes count, and for 4-bit weights the scales. The hash of a base is the same with and
    without adapters over it; an adapter's is independent of the name under which it is loaded, and covers the scale
    that multiplies it.

    Args:
        model: the model; its weights are read one by one, so that no copy of them is held.
        adapter: the adapter to hash instead of the base.

    Raises:
        ModelError: no such adapter, or 4-bit weights that an inference kernel has repacked.
    """
    entries = _base_entries(base_of(model)) if adapter is None else _adapter_entries(model, adapter)
    digest = hashlib.sha256()
    for name, tensor in entries:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        # Viewed as bytes because numpy has no bfloat16; flat because a scalar cannot be viewed.
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if isinstance(model, FSDPModule):
            raw = raw.clone()  # FSDP2 could not free again what numpy has seen
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def adapted_weights_hash(model: PeftModel, *, adapter: str) -> str:
    """Return the hash of the base and one adapter together: of what the two of them compute.

    Raises:
        ModelError: As `weights_hash`.
    """
    both = f"{weights_hash(model)} {weights_hash(model, adapter=adapter)}"
    return hashlib.sha256(both.encode()).hexdigest()


def _base_entries(base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    seen = set()  # tied weights count once
    for name, tensor in base.named_parameters(remove_duplicate=False):
        if ".lora_" in name or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        state = vars(tensor).get("quant_state")
        plain_name = name.replace(".base_layer.", ".")
        if state is None:
            yield plain_name, tensor
        else:
            yield from _four_bit_entries(plain_name, tensor, state)
    persistent = base.state_dict(keep_vars=True)
    for name, buffer in base.named_buffers():
        if name in persistent:
            yield name.replace(".base_layer.", "."), buffer


def _four_bit_entries(name: str, tensor: Tensor, state: Any) -> Iterator[tuple[str, Tensor]]:
    if vars(state).get("packing_format_for_cpu", False):
        raise ModelError(
            f"{name} was repacked for inference by bitsandbytes, which rounded its scales: load the model with "
            "falign.models.load_model, which prevents that, to hash it."
        )
    # Two storage types (bfloat16 for FSDP, uint8) hold the same bytes in other shapes.
    yield f"{name} {tuple(state.shape)}", tensor.data.reshape(-1).view(torch.uint8)
    for key, value in sorted(state.as_dict(packed=True).items()):
        yield f"{name}.{key}", value


def _adapter_entries(model: PreTrainedModel | PeftModel, adapter: str) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(model, PeftModel) or adapter not in model.peft_config:
        known = list(model.peft_config) if isinstance(model, PeftModel) else []
        raise ModelError(f"The model has no adapter named {adapter!r}; it has {known}.")
    for name, tensor in model.named_parameters():
        head, separator, tail = name.partition(f".{adapter}.")
        if separator and ".lora_" in f"{head}.":
            yield f"{head}.{tail}", tensor
    for name, layer in model.named_modules():
        scaling = vars(layer).get("scaling")
        if isinstance(scaling, dict) and adapter in scaling:
            yield f"{name}.scaling", torch.tensor(scaling[adapter], dtype=torch.float64)
