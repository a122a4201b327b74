"""Merging of an adapter into the weights it was trained over."""

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from falign.errors import ModelError
from falign.models.base_weights import beyond_plain_lora
from falign.models.structure import adapted_layers, adapter_matrix, is_transposed, lora_layers

__all__ = ["check_plain_lora", "fold_adapter", "lora_delta"]


@torch.no_grad()
def fold_adapter(base: PreTrainedModel, adapted: PeftModel, *, adapter: str = "default") -> None:
    """Add the update of ``adapter`` to the weights of ``base``, in place.

    Each sum is computed in float32 and rounded once, to the dtype of ``base``. It works layer by layer, without a
    second copy of the weights. A head that shares the weights of the embeddings gets its own copy first, because its
    adapter does not act on the embeddings.

    Args:
        base: the 16- or 32-bit base, loaded from disk. For QLoRA these are not the 4-bit weights: a merge into those
            would have to be quantized again.
        adapted: the trained model.
        adapter: which of its adapters.

    Raises:
        ModelError: anything but plain LoRA, or another architecture.
    """
    check_plain_lora(adapted, adapter)
    embeddings = base.get_input_embeddings().weight
    for name, layer in lora_layers(adapted, adapter).items():
        module = base.get_submodule(name)
        weight = module.weight
        if not isinstance(weight, Tensor):
            raise ModelError(f"{name} has no weight to merge an adapter into: export the adapter instead.")
        if weight is embeddings:
            module.weight = weight = nn.Parameter(weight.clone(), requires_grad=False)
            base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
        delta = lora_delta(layer, adapter).to(weight.device)
        if is_transposed(module):
            delta = delta.T
        if delta.shape != weight.shape:
            raise ModelError(
                f"{name} is {tuple(weight.shape)} in the base and {tuple(delta.shape)} in the adapter: give the "
                "base that the adapter was trained over."
            )
        weight.copy_(weight.float() + delta)


def lora_delta(layer: LoraLayer, adapter: str) -> Tensor:
    """Return the update ``scaling · B A`` of a layer in float32, of shape (out, in)."""
    up, down = adapter_matrix(layer.lora_B, adapter), adapter_matrix(layer.lora_A, adapter)
    return layer.scaling[adapter] * (up.float() @ down.float())


def check_plain_lora(adapted: PeftModel, adapter: str) -> None:
    """Raise unless ``adapter`` consists only of LoRA matrices, which merging and vLLM support.

    Raises:
        ModelError: no such adapter, or one with more than such matrices, or one that changes its base.
    """
    layers = lora_layers(adapted, adapter)
    if not layers:
        raise ModelError(f"The model has no LoRA adapter named {adapter!r}; it has {list(adapted.peft_config)}.")
    for name, layer in adapted_layers(adapted, adapter).items():
        if name not in layers or layer.lora_variant or layer.lora_bias[adapter]:
            raise ModelError(
                f"{name}: adapter {adapter!r} is more than a pair of LoRA matrices on a linear layer (it is on an "
                "embedding, has a bias, or is a variant such as DoRA): train plain LoRA on linear layers to export it."
            )
    for what in beyond_plain_lora(vars(adapted.peft_config[adapter])):
        raise ModelError(
            f"Adapter {adapter!r} {what}: only plain LoRA, pairs of matrices on linear layers, can be trained further, "
            "averaged and exported. Merge it with PEFT (merge_and_unload) and give the merged model."
        )
