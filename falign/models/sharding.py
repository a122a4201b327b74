"""Models sharded over the processes of a run by FSDP2; each layer is gathered while it computes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from falign.errors import ModelError
from falign.models.structure import base_of

__all__ = ["fill_shards", "gathered_weights", "is_sharded", "shard"]


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's weights are sharded over processes."""
    return isinstance(model, FSDPModule)


def shard(model: PreTrainedModel | PeftModel, *, device: torch.device) -> None:
    """Shard a model's weights over all processes, in place.

    Args:
        model: The whole model, the same on every process, with all the adapters that it will have.
        device: Device of the shards; they are moved layer by layer, so it need not hold the whole model.

    Raises:
        ModelError: The model does not name its layers, or its weights are 4-bit.
    """
    base = base_of(model)
    layers = [each for each in base.modules() if type(each).__name__ in set(base._no_split_modules or ())]
    if not layers:
        raise ModelError(
            f"{type(base).__name__} does not name its layers (_no_split_modules), which FSDP2 gathers one by one: "
            "train it with DDP."
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # FSDP2 sets itself up in the first forward pass. That must be one of the whole model, which then owns the layers.
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """Gather all weights in each process while the block runs, so that no forward pass waits for another process.

    All processes must enter it. A model that is not sharded is left as it is.
    """
    parts = [each for each in model.modules() if isinstance(each, FSDPModule)]
    for each in parts:
        each.set_reshard_after_forward(False, recurse=False)
        each.unshard()
    try:
        yield
    finally:
        for each in parts:
            # The default of `fully_shard`: the outermost part is needed again at once, by the backward pass.
            each.set_reshard_after_forward(each is not model, recurse=False)
            each.reshard()


@torch.no_grad()
def fill_shards(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the sharded parameters of the same names."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter = parameters[name]
        assert isinstance(parameter, DTensor)
        parameter.copy_(distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements))
