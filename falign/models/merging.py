"""Merging an adapter into the weights of its base, and the kinds of adapters for which that is possible."""

from collections.abc import Callable

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from falign.errors import ModelError
from falign.models.base_weights import unsupported
from falign.models.structure import (
    adapted_layers,
    is_transposed,
    lora_layers,
    plain_matrix,
    saved_modules,
    trained_tokens,
)

__all__ = ["check_averaged", "check_supported", "fold_adapter", "lora_delta"]


@torch.no_grad()
def fold_adapter(base: PreTrainedModel, adapted: PeftModel, *, adapter: str = "default") -> None:
    """Put everything that ``adapter`` has trained into the weights of ``base``, in place.

    Each weight is computed in float32 and rounded once, to the dtype of ``base``. It works layer by layer, without a
    second copy of the weights. A head that shares the weights of the embeddings gets its own copy first, if the adapter
    changes one of the two alone.

    Args:
        base: The 16- or 32-bit base, loaded from disk. For QLoRA these are not the 4-bit weights: a merge into those
            would have to be quantized again.
        adapted: The trained model.
        adapter: Name of the adapter.

    Raises:
        ModelError: A kind of adapter that is not supported, or another architecture.
    """
    check_supported(adapted, adapter)
    for name, layer in lora_layers(adapted, adapter).items():
        module = base.get_submodule(name.replace(".base_layer", ""))  # the layers of experts are nested
        parameter = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        _change(base, module, parameter, lambda weight, layer=layer: _merged(weight, layer, adapter), place=name)
    for name, trained in saved_modules(adapted, adapter).items():
        module = base.get_submodule(name)
        for own, tensor in trained.named_parameters():
            inner, _, parameter = own.rpartition(".")
            _change(base, module.get_submodule(inner), parameter, lambda _, new=tensor: new.float(), place=name)
    for name, (ids, rows) in trained_tokens(adapted, adapter).items():
        # Of a head with the same weights PEFT has a second wrapper over the same rows, which changes nothing more.
        weight = base.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight[torch.tensor(ids, device=weight.device)] = rows.to(weight)


def _change(
    base: PreTrainedModel, module: nn.Module, name: str, change: Callable[[Tensor], Tensor], *, place: str
) -> None:
    """Replace a weight of the base by a function of it in float32."""
    weight = getattr(module, name)
    if not isinstance(weight, Tensor):
        raise ModelError(f"{place} has no {name} to merge an adapter into: export the adapter instead.")
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    if module in (embeddings, head) and name == "weight" and head is not None and head.weight is embeddings.weight:
        module.weight = weight = nn.Parameter(weight.clone(), requires_grad=False)
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    transposed = is_transposed(module) and weight.ndim == 2
    merged = change((weight.T if transposed else weight).float())
    merged = merged.T if transposed else merged
    if merged.shape != weight.shape:
        raise ModelError(
            f"{place} is {tuple(weight.shape)} in the base and {tuple(merged.shape)} in the adapter: give the base "
            "that the adapter was trained over."
        )
    weight.copy_(merged)


def _merged(weight: Tensor, layer: LoraLayer, adapter: str) -> Tensor:
    """Return the weight (out, in) of an adapted layer in float32, or the stack of the weights of experts."""
    update = lora_delta(layer, adapter).to(weight.device)
    if update.shape != weight.shape:
        return update  # refused by the caller, with both shapes
    merged = weight + update
    if adapter not in layer.lora_magnitude_vector:
        return merged
    magnitudes = layer.lora_magnitude_vector[adapter].weight
    assert isinstance(magnitudes, Tensor)
    return (magnitudes.to(weight) / torch.linalg.norm(merged, dim=1))[:, None] * merged


def lora_delta(layer: LoraLayer, adapter: str) -> Tensor:
    """Return the update ``scaling · B A`` of a layer in float32, of shape (out, in); of experts a stack of updates."""
    up, down = plain_matrix(layer.lora_B, adapter).float(), plain_matrix(layer.lora_A, adapter).float()
    if not isinstance(layer, ParamWrapper) or layer.num_experts == 1:
        return layer.scaling[adapter] * (up @ down)
    # PEFT's layout: A is (experts · r, in), B is (out, r · experts).
    downs, ups = down.reshape(layer.num_experts, -1, down.shape[1]), up.reshape(len(up), -1, layer.num_experts)
    stack = torch.einsum("ore,eri->eoi", ups, downs)
    # Some architectures store (experts, in, out), which PEFT finds out when it adds the adapter.
    return layer.scaling[adapter] * (stack if layer._did_swap_in_out_features else stack.transpose(1, 2))


def check_supported(adapted: PeftModel, adapter: str) -> None:
    """Raise unless ``adapter`` can be trained and exported.

    That is LoRA on linear layers or on the stacked parameters of experts, DoRA, modules trained as a whole, and trained
    tokens.

    Raises:
        ModelError: No such adapter, or one of another kind, or one that changes its base.
    """
    layers = lora_layers(adapted, adapter)
    if not layers:
        raise ModelError(f"The model has no LoRA adapter named {adapter!r}; it has {list(adapted.peft_config)}.")
    for what in unsupported(vars(adapted.peft_config[adapter])):
        raise ModelError(
            f"Adapter {adapter!r} {what}: only LoRA, DoRA, modules_to_save, trained tokens and target_parameters can "
            "be trained further and exported. Merge it with PEFT (merge_and_unload) and give the merged model."
        )
    for name, layer in adapted_layers(adapted, adapter).items():
        variant = adapter in layer.lora_variant and adapter not in layer.lora_magnitude_vector
        if name not in layers or variant or layer.lora_bias[adapter]:
            raise ModelError(
                f"{name}: adapter {adapter!r} is more than a pair of LoRA matrices on a linear layer (it is on an "
                "embedding, has a bias, or is a variant other than DoRA): train LoRA on linear layers to export it."
            )


def check_averaged(adapted: PeftModel, adapter: str) -> None:
    """Raise unless averages of ``adapter`` with its own past are adapters of its kind.

    Raises:
        ModelError: As `check_supported`, or DoRA, or LoRA on the parameters of experts.
    """
    check_supported(adapted, adapter)
    settings = vars(adapted.peft_config[adapter])
    for field, reason in _WITHOUT_AVERAGE.items():
        if settings.get(field):
            raise ModelError(
                f"Adapter {adapter!r} has {field}, and {reason}: use a reference that is a copy of the policy "
                "(periodic_reset), or plain LoRA."
            )


_WITHOUT_AVERAGE = {
    "use_dora": "the average of two DoRA weights, each with its own norms, is not DoRA",
    "target_parameters": "sums of the matrices of experts are not supported",
}
