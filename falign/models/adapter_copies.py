"""Frozen adapters that follow the trained one: a copy of it, or an average over its past."""

import copy

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from falign.errors import ConfigError
from falign.models.adapter_tensors import AdapterTensors, install_adapter
from falign.models.lora_factors import cut_to_rank, factors_of, weighted_sum
from falign.models.merging import check_averaged, check_supported
from falign.models.structure import PREFIX, adapter_matrix, adapter_weights, lora_layers

__all__ = ["add_average", "add_copy", "average_into", "copy_into", "tensors_of"]


def add_copy(model: PeftModel, *, source: str = "default", name: str = "ref") -> None:
    """Add a frozen copy of an adapter.

    Raises:
        ModelError: The name is in use, or the kind of adapter is not supported.
    """
    check_supported(model, source)
    config = _config(model, source)
    install_adapter(model, AdapterTensors(config, adapter_weights(model, source)), name=name)


def add_average(model: PeftModel, *, rank: int, source: str = "default", name: str = "ref") -> None:
    """Add a frozen adapter of rank ``rank`` with the same updates as another adapter of at most this rank.

    Raises:
        ConfigError: The other adapter has a higher rank.
        ModelError: The name is in use, or averages of the adapter are not of its kind.
    """
    check_averaged(model, source)
    own = max(each.r[source] for each in lora_layers(model, source).values())
    if rank < own:
        raise ConfigError(f"a rank of {rank} has no room for an adapter of rank {own}: give at least {own}.")
    config, layers = _config(model, source), lora_layers(model, source)
    config.r, config.rank_pattern, config.use_rslora = rank, {}, False
    # The same scales per layer, so that the copy computes the same update; zeros fill the additional columns.
    config.lora_alpha = rank
    config.alpha_pattern = {layer: each.scaling[source] * rank for layer, each in layers.items()}
    tensors = {}
    for key, tensor in adapter_weights(model, source).items():
        if not _is_matrix(key):
            tensors[key] = tensor
            continue
        shape = (rank, tensor.shape[1]) if ".lora_A." in key else (tensor.shape[0], rank)
        tensors[key] = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        tensors[key][: tensor.shape[0], : tensor.shape[1]] = tensor
    install_adapter(model, AdapterTensors(config, tensors), name=name)


@torch.no_grad()
def copy_into(model: PeftModel, *, source: str = "default", name: str = "ref") -> None:
    """Overwrite an adapter of `add_copy` with the current state of its original."""
    new = tensors_of(model, source)
    for key, tensor in tensors_of(model, name).items():
        tensor.copy_(new[key])


@torch.no_grad()
def average_into(model: PeftModel, *, alpha: float, source: str = "default", name: str = "ref") -> float:
    """Set ``ΔW ← (1-α) ΔW + α ΔW_source`` in an adapter of `add_average`, and return the truncation error.

    The updates are averaged, not A and B: the product of two averages would have cross terms between the present policy
    and the past. The sum has the columns of both, and is cut to the adapter's rank. Modules that are trained as a whole
    and trained tokens are averaged as they are.

    Returns:
        Norm of what was cut off, as a share of the norm of all updates together.
    """
    old, new = factors_of(model, name), factors_of(model, source)
    discarded, total = [], []
    for layer_name, layer in lora_layers(model, name).items():
        up, down = adapter_matrix(layer.lora_B, name), adapter_matrix(layer.lora_A, name)
        cut = cut_to_rank(weighted_sum([1 - alpha, alpha], [old[layer_name], new[layer_name]]), len(down))
        up.copy_(cut.factors.up / layer.scaling[name])
        down.copy_(cut.factors.down)
        discarded.append(cut.discarded.cpu())
        total.append(cut.total.cpu())
    present = adapter_weights(model, source)
    for key, tensor in adapter_weights(model, name).items():
        if not _is_matrix(key):
            tensor.lerp_(present[key].to(tensor), alpha)
    whole = torch.stack(total).sum()
    return (torch.stack(discarded).sum() / whole).sqrt().item() if whole > 0 else 0.0


def tensors_of(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter, under short names without the adapter's name.

    Those of a copy or an average are its own, not copies.
    """
    return {
        key.removeprefix(PREFIX).removesuffix(".weight"): each for key, each in adapter_weights(model, adapter).items()
    }


def _is_matrix(key: str) -> bool:
    return ".lora_A." in key or ".lora_B." in key


def _config(model: PeftModel, adapter: str) -> LoraConfig:
    config = copy.deepcopy(model.peft_config[adapter])
    assert isinstance(config, LoraConfig)
    config.lora_dropout = 0.0
    return config
