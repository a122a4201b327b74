"""Models whose weights are spread over the processes of a run (FSDP2), each layer gathered while it computes."""

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

__all__ = ["fill_shards", "is_sharded", "shard", "weights_at_hand"]


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's weights are spread over processes."""
    return isinstance(model, FSDPModule)


def shard(model: PreTrainedModel | PeftModel, *, device: torch.device) -> None:
    """Spread a model's weights over all processes, in place.

    Args:
        model: the whole model, the same on every process, with all the adapters that it will have.
        device: where the shards are put; layer by layer, so that it need not hold the whole model.

    Raises:
        ModelError: it does not say what its layers are, or its weights are 4-bit.
    """
    base = base_of(model)
    layers = [each for each in base.modules() if type(each).__name__ in set(base._no_split_modules or ())]
    if not layers:
        raise ModelError(f"{type(base).__name__} does not say what its layers are, which FSDP2 gathers one by one.")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # The first pass has to be one of the whole model: it tells the layers that they are parts of it.
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)


@contextmanager
def weights_at_hand(model: nn.Module) -> Iterator[None]:
    """Hold the whole weights in each process for a while, so that no pass waits for another process.

    All processes have to come in. Models that are not sharded are left as they are.
    """
    parts = [each for each in model.modules() if isinstance(each, FSDPModule)]
    for each in parts:
        each.set_reshard_after_forward(False, recurse=False)
        each.unshard()
    try:
        yield
    finally:
        for each in parts:
            # As `fully_shard` sets it: the outermost part is needed again at once, by the backward pass.
            each.set_reshard_after_forward(each is not model, recurse=False)
            each.reshard()


@torch.no_grad()
def fill_shards(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, by the names of parameters, into what each process holds of them."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter = parameters[name]
        assert isinstance(parameter, DTensor)
        parameter.copy_(distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements))
