"""Check that a server can serve a trained adapter over its base model without merging."""

from __future__ import annotations

import math
from collections.abc import Iterator

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from falign.models.adapter_settings import BEYOND_PLAIN_LORA, base_change
from falign.models.structure import base_of, lora_layers

__all__ = ["why_not_servable"]


def why_not_servable(model: nn.Module, *, max_rank: int) -> str | None:
    """Return why the weights that are trained cannot be served as an adapter, or None where they can.

    Args:
        model: The policy.
        max_rank: What the server has room for; 0 where it serves no adapters.
    """
    if not isinstance(model, PeftModel):
        return "all weights are trained, there is no adapter"
    if len(model.active_adapters) != 1:
        return f"{len(model.active_adapters)} adapters are active, {', '.join(model.active_adapters)}"
    name = model.active_adapters[0]
    config = model.peft_config[name]
    if not isinstance(config, LoraConfig):
        return f"adapter {name!r} is {config.peft_type}, not LoRA"
    return next(_beyond_lora(config), None) or next(_unfit_layers(model, name, max_rank), None)


def _beyond_lora(config: LoraConfig) -> Iterator[str]:
    for field in BEYOND_PLAIN_LORA:
        if value := getattr(config, field):
            yield f"the adapter has {field}={value}"
    if (change := base_change(vars(config))) is not None:
        yield f"the adapter changes the base model ({change})"


def _unfit_layers(model: PeftModel, name: str, max_rank: int) -> Iterator[str]:
    if max_rank == 0:
        yield "the server serves no adapters (--enable-lora)"
    base, layers = base_of(model), lora_layers(model, name)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if any(isinstance(end, LoraLayer) and name in {*end.lora_A, *end.lora_embedding_A} for end in ends):
        yield "embeddings or head have an adapter, and the ends of the model are served without"
    for place, layer in layers.items():
        if layer.lora_variant:
            yield f"{place} has {', '.join(type(each).__name__ for each in layer.lora_variant.values())}"
        rank, root = layer.r[name], layer.use_rslora.get(name, False)
        if rank > max_rank:
            yield f"the rank of {place}, {rank}, is above --max-lora-rank {max_rank} of the server"
        if not math.isclose(layer.scaling[name], layer.lora_alpha[name] / (math.sqrt(rank) if root else rank)):
            yield f"{place} is scaled by {layer.scaling[name]:g}, which is not what its alpha and rank say"
