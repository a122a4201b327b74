"""What a model consists of, for the run manifest and for tables."""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from falign.models.structure import base_of

__all__ = ["ModelDescription", "describe"]


@dataclass(frozen=True)
class ModelDescription:
    """Parameter counts (4-bit weights counted one by one), storage types and quantisation of a model."""

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
    """Count what ``model`` consists of."""
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
    # Two 4-bit weights share a byte, and the storage type says nothing about them.
    state = vars(parameter).get("quant_state")
    if state is not None:
        return math.prod(state.shape), state.quant_type
    return parameter.numel(), str(parameter.dtype).removeprefix("torch.")
