"""The parts of a model: the base under its adapters, its linear layers, and those that carry an adapter."""

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from falign.errors import ModelError
from falign.models.adapter_modules import StartedMatrix

__all__ = [
    "PREFIX",
    "adapted_layers",
    "adapter_matrix",
    "adapter_weights",
    "base_name",
    "base_of",
    "expert_modules",
    "is_transposed",
    "linear_modules",
    "lora_layers",
    "plain_matrix",
    "saved_modules",
    "trained_tokens",
    "without_adapters",
]

PREFIX = "base_model.model."
"""Beginning of the names of weights in PEFT's files, before the name of the module in the base."""


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model under the adapters, or the model itself."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise ModelError(f"The adapters are over a {type(base).__name__}: only transformers models are supported.")
    return base


def without_adapters(module: nn.Module) -> nn.Module:
    """Return the module of the base under any number of PEFT's layers, or the module itself."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        inner = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.base_layer
        assert isinstance(inner, nn.Module)
        module = inner
    return module


def base_name(model: PreTrainedModel | PeftModel) -> str:
    """Return the name or folder that the base was loaded from.

    Raises:
        ModelError: A model that was built in memory.
    """
    name = base_of(model).name_or_path
    if not name:
        raise ModelError("The base model was built in memory: save it, load it from there, and train that.")
    return name


def linear_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the linear layers, quantized ones included, by their full names.

    Architectures derive other layers from ``nn.Linear``, such as routers that return a choice of experts. An adapter
    needs a layer that computes a product, so these are left out.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    classes = {type(module): module for module in linear.values()}
    multiply = {kind: _multiplies(module) for kind, module in classes.items()}
    return {name: module for name, module in linear.items() if multiply[type(module)]}


@torch.no_grad()
def _multiplies(module: nn.Module) -> bool:
    """Return whether a layer computes ``x Wᵀ + b``; a class with its own forward is tested on one vector."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return True
    if "quant_state" in vars(module.weight) or not module.weight.is_floating_point():  # layers of bitsandbytes
        return True
    # One vector of distinct values tells a product from any other use of the weight.
    vector = torch.linspace(-1, 1, module.in_features).to(module.weight)[None]
    try:
        output = module(vector)
    except (RuntimeError, TypeError, ValueError, IndexError):  # it needs another input shape
        return False
    expected = nn.functional.linear(vector, module.weight, module.bias)
    return isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-2)


def expert_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of modules with stacks of matrices as parameters, such as the experts of a mixture."""
    return [
        name
        for name, module in model.named_modules()
        if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    ]


def is_transposed(module: nn.Module) -> bool:
    """Return whether the checkpoint of a linear layer stores its weight as (in, out), as GPT-2's do."""
    # transformers records the class that a 4-bit layer replaces; the 4-bit weight itself is (out, in).
    return Conv1D in (type(module), vars(module).get("source_cls"))


def adapted_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Return the layers that carry ``adapter``, embeddings included, by the names they have in the base model."""
    return {
        name: module
        for name, module in base_of(model).named_modules()
        if isinstance(module, LoraLayer) and adapter in {*module.lora_A, *module.lora_embedding_A}
    }


def lora_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Return the linear layers that carry ``adapter``, by the names they have in the base model."""
    return {name: layer for name, layer in adapted_layers(model, adapter).items() if adapter in layer.lora_A}


def adapter_matrix(matrices: nn.ModuleDict, adapter: str) -> Tensor:
    """Return the weight of ``lora_A`` or ``lora_B`` of one adapter."""
    weight = matrices[adapter].weight
    assert isinstance(weight, Tensor)
    return weight


def plain_matrix(matrices: nn.ModuleDict, adapter: str) -> Tensor:
    """Return ``lora_A`` or ``lora_B`` as an adapter of plain LoRA has it, detached."""
    module = matrices[adapter]
    return module.plain().detach() if isinstance(module, StartedMatrix) else adapter_matrix(matrices, adapter).detach()


def saved_modules(model: PeftModel, adapter: str) -> dict[str, nn.Module]:
    """Return the modules that an adapter trains as a whole (``modules_to_save``), by their names in the base."""
    return {
        name: module.modules_to_save[adapter]
        for name, module in base_of(model).named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    }


def trained_tokens(model: PeftModel, adapter: str) -> dict[str, tuple[list[int], Tensor]]:
    """Return the token ids that an adapter trains and their rows, by the name of the embeddings or head."""
    return {
        name: (module.token_adapter.token_indices[adapter], module.token_adapter.trainable_tokens_delta[adapter])
        for name, module in base_of(model).named_modules()
        if isinstance(module, TrainableTokensWrapper) and adapter in module.token_adapter.token_indices
    }


def adapter_weights(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return the weights of one adapter under PEFT's names for files, as plain LoRA where it has another form."""
    # The state dictionary of a sharded model contains shards, even while the model is unsharded.
    state = {name: each.detach() for name, each in model.named_parameters()} if isinstance(model, FSDPModule) else None
    found = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter, save_embedding_layers=False)
    for name, layer in lora_layers(model, adapter).items():
        for kind, matrices in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            if isinstance(module := matrices[adapter], StartedMatrix):
                found[f"{PREFIX}{name}.{kind}.weight"] = module.plain().detach()
    return found
