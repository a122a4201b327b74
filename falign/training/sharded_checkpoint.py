"""Checkpoints of models whose weights are spread over processes: whole, so that they look like any other."""

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

from falign.models.sharding import fill_shards, weights_at_hand

__all__ = ["read_optimizer", "read_weights", "whole_optimizer", "whole_weights"]

WEIGHTS = ("adapter_model*.safetensors", "model*.safetensors")


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint keeps of a model, its adapters or all of it; all processes have to call it."""
    adapted = isinstance(model, PeftModel)
    with weights_at_hand(model):
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in model.named_parameters()
            if not adapted or parameter.requires_grad or ".lora_" in name
        }


def read_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load what a checkpoint has of the weights that are trained.

    Raises:
        KeyError: One of them is not in it.
    """
    files = [file for pattern in WEIGHTS for file in checkpoint.glob(pattern)]
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # PEFT leaves the adapter's name out.
    fill_shards(model, {name: tensors[name.replace(".default.", ".")] for name in trained})


def whole_optimizer(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's state by the names of parameters; all processes have to call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, _own(optimizer), options=options)


def read_optimizer(model: nn.Module, optimizer: Any, file: Path) -> None:
    """Load what :func:`whole_optimizer` returned."""
    state = torch.load(file, weights_only=True)
    if not state["state"]:  # plain gradient descent remembers nothing
        return
    set_optimizer_state_dict(model, _own(optimizer), state, options=StateDictOptions(full_state_dict=True))


def _own(optimizer: Any) -> torch.optim.Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
