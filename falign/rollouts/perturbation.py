"""A temporary, visible change of a policy's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from falign.errors import ConfigError
from falign.models.structure import adapter_matrix, base_of, linear_modules, lora_layers, without_adapters

__all__ = ["perturbed"]

_SHARE = 0.1  # size of the change relative to the weights
_USUAL_STD = 0.02  # assumed for packed weights, where it cannot be computed


@contextmanager
def perturbed(policy: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Perturb some of the trained weights, and restore them bit for bit on exit.

    At the start of a run B = 0 and the policy equals its base, so a sampler without the adapter would pass the test.
    With adapters, noise is added to all B; without, to the last linear layer before the head.

    Args:
        policy: The model in training.

    Raises:
        ConfigError: The policy has neither LoRA nor a linear layer that trains.
    """
    changes = list(_changes(policy))
    if not changes:
        raise ConfigError(
            "The policy has no LoRA and no linear layer that trains, so no sampler can be tested with it."
        )
    before = [weight.detach().clone() for weight, _ in changes]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for weight, std in changes:
                weight.copy_(weight + std * torch.randn(weight.shape, generator=generator).to(weight))
        yield
    finally:
        with torch.no_grad():
            for (weight, _), old in zip(changes, before, strict=True):
                weight.copy_(old)


def _changes(policy: PreTrainedModel | PeftModel) -> Iterator[tuple[Tensor, float]]:
    """Yield the weights to change, each with the standard deviation of its noise."""
    if isinstance(policy, PeftModel):
        name = policy.active_adapters[0]
        for layer in lora_layers(policy, name).values():
            down, up = adapter_matrix(layer.lora_A, name).detach(), adapter_matrix(layer.lora_B, name)
            std = _std(layer)
            size = layer.scaling[name] * layer.r[name] ** 0.5 * float(down.float().std())
            yield up, _SHARE * std / max(size, 1e-8)
        return
    base = base_of(policy)
    inner = [module for module in linear_modules(base).values() if module is not base.get_output_embeddings()]
    for module in inner[-1:]:
        assert isinstance(module.weight, Tensor)
        yield module.weight, 3 * _SHARE * float(module.weight.detach().float().std())


def _std(layer: LoraLayer) -> float:
    """Return the standard deviation of the base weights under an adapter's layer, experts included."""
    assert isinstance(layer, nn.Module)
    own = [weight for weight in without_adapters(layer).parameters(recurse=False) if weight.ndim > 1]
    weights = [weight.detach().float() for weight in own if "quant_state" not in vars(weight)]
    return max((float(weight.std()) for weight in weights), default=_USUAL_STD)
