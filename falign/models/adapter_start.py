"""A policy that starts from an adapter trained before, such as the one from supervised tuning."""

from pathlib import Path

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from falign.models.adapters import load_adapter
from falign.models.merging import check_plain_lora
from falign.models.sources import adapter_folder, resolve
from falign.models.structure import base_name, lora_layers

__all__ = ["start_from_adapter"]


def start_from_adapter(
    model: PreTrainedModel, path: str | Path, *, dropout: float = 0.0, revision: str | None = None
) -> PeftModel:
    """Give ``model`` a trainable copy of an adapter, named ``default``; rank, scale and targets are its own.

    Args:
        model: the base, changed in place.
        path: the adapter's folder, or a run that has trained one; nothing is written there.
        dropout: on the adapter's input, while training.
        revision: the base's revision on the hub, to be recorded in the adapter's configuration.

    Raises:
        ModelError: no adapter there, one for another base, or one that is more than LoRA matrices, which could not
            be exported again.
    """
    adapted = load_adapter(model, adapter_folder(path), trainable=True)
    check_plain_lora(adapted, "default")
    config = adapted.peft_config["default"]
    assert isinstance(config, LoraConfig)
    config.lora_dropout = dropout
    config.base_model_name_or_path = resolve(base_name(model))
    config.revision = revision
    for layer in lora_layers(adapted, "default").values():
        layer.lora_dropout["default"] = nn.Dropout(dropout) if dropout else nn.Identity()
    return adapted
