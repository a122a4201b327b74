"""Identity of a model: its description, and content hashes of its weights and configuration."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from falign.errors import ModelError
from falign.models.base_weights import BEYOND_PLAIN_LORA, base_weights
from falign.models.structure import base_of

__all__ = [
    "ModelDescription",
    "adapted_weights_hash",
    "add_tensor",
    "config_hash",
    "describe",
    "model_identity",
    "weights_hash",
]


# Fields of a configuration, at any depth, that do not change logits. All other fields count, including unknown ones.
# The dtypes of weights are part of `weights_hash`, and the attention implementation is recorded separately. The storage
# dtype of bitsandbytes does not change its bytes.
_NOT_COMPUTED_WITH = frozenset(
    {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "use_cache"}
    | {"dtype", "torch_dtype", "_attn_implementation", "_experts_implementation", "attn_implementation"}
    | {"_attn_implementation_internal", "_attn_implementation_autoset", "_experts_implementation_internal"}
    | {"bos_token_id", "eos_token_id", "bnb_4bit_quant_storage"}
)


def weights_hash(model: PreTrainedModel | PeftModel, *, adapter: str | None = None) -> str:
    """Return the SHA-256 of the base weights, adapters excluded, or of one adapter.

    It covers names, shapes, dtypes and bytes, and the scales of quantized weights. The hash of a base is the same with
    and without adapters over it. The hash of an adapter does not depend on the name under which it is loaded, and
    covers its scaling.

    Args:
        model: The model; its weights are read one by one, so that no copy of them is held.
        adapter: The adapter to hash instead of the base.

    Raises:
        ModelError: No such adapter, a base that an adapter has changed, or 4-bit weights that an inference kernel has
            repacked.
    """
    entries = _base_entries(model) if adapter is None else _adapter_entries(model, adapter)
    digest = hashlib.sha256()
    for name, tensor in entries:
        add_tensor(digest, name, tensor)
    return digest.hexdigest()


def add_tensor(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Add a tensor to a digest: its name, shape, type and bytes."""
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    # A copy, because FSDP2 cannot free memory that numpy has seen. Viewed as bytes, because numpy has no bfloat16;
    # flat, because a scalar cannot be viewed as another dtype.
    raw = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1).view(torch.uint8)
    digest.update(raw.numpy().data)


def adapted_weights_hash(model: PeftModel, *, adapter: str) -> str:
    """Return the hash of the base and one adapter together.

    Raises:
        ModelError: As `weights_hash`.
    """
    both = f"{weights_hash(model)} {weights_hash(model, adapter=adapter)}"
    return hashlib.sha256(both.encode()).hexdigest()


def model_identity(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    """Return the identity of a base: the hashes of its ``weights`` and of its ``config``.

    Raises:
        ModelError: As `weights_hash`.
    """
    return {"weights": weights_hash(model), "config": config_hash(model)}


def config_hash(model: PreTrainedModel | PeftModel) -> str:
    """Return the SHA-256 of the parts of a model's configuration that change logits.

    The configuration is used as loaded, with its defaults. So a missing field equals one with the default value, and
    files of two versions of transformers have the same hash. Names, paths, versions, caching, the dtypes of weights and
    the ids at which generation stops do not count.

    Args:
        model: The model; adapters over it do not count.
    """
    content = json.dumps(_computed_with(base_of(model).config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _computed_with(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _computed_with(each) for key, each in value.items() if key not in _NOT_COMPUTED_WITH}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_computed_with(each) for each in value]
    # Loaded from the hub, a class of remote code is named "repository--module.Class"; in a local copy "module.Class".
    return value.rpartition("--")[2] if isinstance(value, str) else value


def _base_entries(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in base_weights(model):
        state, scale = vars(tensor).get("quant_state"), vars(tensor).get("SCB")
        if scale is not None:  # of 8-bit weights, by row
            yield name, tensor.data
            yield f"{name}.SCB", scale
        elif state is None:
            yield name, tensor
        else:
            yield from _four_bit_entries(name, tensor, state)


def _four_bit_entries(name: str, tensor: Tensor, state: Any) -> Iterator[tuple[str, Tensor]]:
    if vars(state).get("packing_format_for_cpu", False):
        raise ModelError(
            f"{name} was repacked for inference by bitsandbytes, which rounded its scales: load the model with "
            "falign.models.load_model, which prevents that, to hash it."
        )
    # Two storage dtypes (bfloat16 for FSDP, uint8) hold the same bytes in different shapes.
    yield f"{name} {tuple(state.shape)}", tensor.data.reshape(-1).view(torch.uint8)
    for key, value in sorted(state.as_dict(packed=True).items()):
        yield f"{name}.{key}", value


def _adapter_entries(model: PreTrainedModel | PeftModel, adapter: str) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(model, PeftModel) or adapter not in model.peft_config:
        known = list(model.peft_config) if isinstance(model, PeftModel) else []
        raise ModelError(f"The model has no adapter named {adapter!r}; it has {known}.")
    for name, tensor in model.named_parameters():
        if (plain_name := _name_in_adapter(name, adapter)) is not None:
            yield plain_name, tensor
    for name, layer in model.named_modules():
        scaling = vars(layer).get("scaling")
        if isinstance(scaling, dict) and adapter in scaling:
            yield f"{name}.scaling", torch.tensor(scaling[adapter], dtype=torch.float64)
    settings = vars(model.peft_config[adapter])
    beyond = {field: settings[field] for field in sorted(BEYOND_PLAIN_LORA) if settings.get(field)}
    if beyond:
        text = json.dumps(beyond, sort_keys=True, default=lambda value: sorted(map(str, value)))
        yield "settings", torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _name_in_adapter(name: str, adapter: str) -> str | None:
    """Return a parameter's name without the adapter's, or None for a parameter of the base or of another adapter."""
    parts = name.split(".")
    for place, (kind, found) in enumerate(pairwise(parts), start=1):
        if found == adapter and (kind.startswith("lora_") or kind in ("modules_to_save", "trainable_tokens_delta")):
            return ".".join(parts[:place] + parts[place + 1 :])
    return None


@dataclass(frozen=True)
class ModelDescription:
    """Parameter counts (4-bit weights counted individually), storage dtypes and quantization of a model."""

    name_or_path: str
    architecture: str
    total_parameters: int
    trainable_parameters: int
    adapter_parameters: int
    parameters_by_dtype: dict[str, int]  # "nf4" for 4-bit weights
    trainable_dtypes: tuple[str, ...]
    quantization: str | None
    adapters: tuple[str, ...]
    memory_bytes: int


def describe(model: PreTrainedModel | PeftModel) -> ModelDescription:
    """Return parameter counts, dtypes and memory of ``model``."""
    base = base_of(model)
    counts: Counter[str] = Counter()
    trainable = adapter = memory = 0
    trainable_dtypes = set()
    for name, parameter in model.named_parameters():
        size, kind = _size_and_kind(parameter)
        counts[kind] += size
        memory += parameter.numel() * parameter.element_size()
        adapter += size if ".lora_" in name else 0
        if parameter.requires_grad:
            trainable += size
            trainable_dtypes.add(kind)
    kinds = [kind for kind in ("nf4", "fp4", "int8") if counts[kind]]
    return ModelDescription(
        name_or_path=base.name_or_path or "",
        architecture=type(base).__name__,
        total_parameters=sum(counts.values()),
        trainable_parameters=trainable,
        adapter_parameters=adapter,
        parameters_by_dtype=dict(counts),
        trainable_dtypes=tuple(sorted(trainable_dtypes)),
        quantization=kinds[0] if kinds else None,
        adapters=tuple(model.peft_config) if isinstance(model, PeftModel) else (),
        memory_bytes=memory,
    )


def _size_and_kind(parameter: torch.nn.Parameter) -> tuple[int, str]:
    # Two 4-bit weights share a byte, and the storage dtype does not show their number.
    state = vars(parameter).get("quant_state")
    if state is not None:
        return math.prod(state.shape), state.quant_type
    return parameter.numel(), str(parameter.dtype).removeprefix("torch.")
