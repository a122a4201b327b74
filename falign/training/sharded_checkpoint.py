"""Checkpoints of sharded models, written whole: the same files as without sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from falign.models.sharding import fill_shards, gathered_weights

__all__ = ["read_optimizer", "read_weights", "whole_optimizer", "whole_weights"]

WEIGHTS = ("adapter_model*.safetensors", "model*.safetensors")


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that a checkpoint stores: adapters, or all weights; all processes must call it."""
    adapted = isinstance(model, PeftModel)
    with gathered_weights(model):
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in model.named_parameters()
            if not adapted or parameter.requires_grad or ".lora_" in name
        }


def read_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load the trained weights of a checkpoint.

    Raises:
        KeyError: The checkpoint lacks one of them.
    """
    files = [file for pattern in WEIGHTS for file in checkpoint.glob(pattern)]
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # PEFT writes names without that of the adapter, "default".
    fill_shards(model, {name: tensors[name.replace(".default.", ".")] for name in trained})


def whole_optimizer(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's state by parameter name; all processes must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, _own(optimizer), options=options)


def read_optimizer(model: nn.Module, optimizer: Any, file: Path) -> None:
    """Load a state that :func:`whole_optimizer` returned."""
    state = torch.load(file, weights_only=True)
    if not state["state"]:  # plain SGD has no state
        return
    set_optimizer_state_dict(model, _own(optimizer), state, options=StateDictOptions(full_state_dict=True))


def _own(optimizer: Any) -> torch.optim.Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
