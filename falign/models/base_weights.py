"""The base under a model's adapters: its weights, by their names in the model without adapters."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from falign.errors import ModelError
from falign.models.structure import base_of, is_transposed, without_adapters

__all__ = [
    "BEYOND_PLAIN_LORA",
    "base_change",
    "base_parameters",
    "base_storage",
    "base_weights",
    "beyond_plain_lora",
    "check_base_intact",
    "check_quantized_from",
    "unsupported",
]


# Shares of a weight's norm. For normal weights nf4 rounding is 0.09 and int8 rounding 0.01; another model differs by
# 1.4.
_ROUNDING = {4: 0.3, 8: 0.05}


def base_weights(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and persistent buffers of the base, unwrapped from adapters; tied weights come once.

    Raises:
        ModelError: An adapter has changed the base, so that it is not the model that the adapter was made for.
    """
    check_base_intact(model)
    seen = set()
    for name, parameter in base_parameters(model).items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter
    persistent = {id(value) for value in base_of(model).state_dict(keep_vars=True).values()}
    for name, module in _base_modules(model):
        for own, buffer in module.named_buffers(name, recurse=False):
            if id(buffer) in persistent and id(buffer) not in seen:
                seen.add(id(buffer))
                yield own, buffer


def base_parameters(model: PreTrainedModel | PeftModel) -> dict[str, nn.Parameter]:
    """Return the parameters of the base by name; tied ones appear under each of their names."""
    return {
        own: parameter
        for name, module in _base_modules(model)
        for own, parameter in module.named_parameters(name, recurse=False, remove_duplicate=False)
    }


def base_storage(model: PreTrainedModel | PeftModel) -> str:
    """Return the dtypes of the base's weights, which distinguish two hashes of one base."""
    kinds = {_kind(parameter) for parameter in base_parameters(model).values()}
    return " ".join(sorted(kinds))


def _kind(parameter: nn.Parameter) -> str:
    state = vars(parameter).get("quant_state")
    return str(parameter.dtype).removeprefix("torch.") if state is None else str(state.quant_type)


@torch.no_grad()
def check_quantized_from(original: PreTrainedModel, model: PreTrainedModel | PeftModel) -> None:
    """Raise unless the quantized weights of a base are the rounded weights of another model.

    Raises:
        ModelError: A weight is not; the message names the first one.
    """
    stored = {name: each for name, each in base_parameters(model).items() if {"quant_state", "SCB"} & vars(each).keys()}
    modules = dict(original.named_modules())
    for name, packed in stored.items():
        restored, bits = _restored(packed)
        # bitsandbytes packs the weight as (out, in); Conv1D stores the original as (in, out).
        module, share = modules.get(name.removesuffix(".weight")), math.inf
        if isinstance(module, nn.Linear | Conv1D):
            weight = (module.weight.T if is_transposed(module) else module.weight).cpu().float()
            share = float((restored - weight).norm() / weight.norm()) if restored.shape == weight.shape else math.inf
        if not share <= _ROUNDING[bits]:
            raise ModelError(
                f"{original.name_or_path} is not the model that {base_of(model).name_or_path} was quantized from: "
                f"{name} differs by {share:.0%} of its norm, where {bits} bits explain {_ROUNDING[bits]:.0%}. Give "
                "that model."
            )


def _restored(packed: nn.Parameter) -> tuple[Tensor, int]:
    """Return the float32 weights that a quantized parameter stands for, and its bits."""
    # Both imports are slow, and needed here alone.
    if "SCB" in vars(packed):
        from falign.models.int8 import restored

        return restored(packed.data, vars(packed)["SCB"]).cpu(), 8
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed.data, vars(packed)["quant_state"]).cpu().float(), 4


def check_base_intact(model: nn.Module) -> None:
    """Raise if adapters have changed the base's own weights.

    Raises:
        ModelError: An adapter has; the message names it and the change.
    """
    if not isinstance(model, PeftModel):
        return
    for adapter, config in model.peft_config.items():
        if (change := base_change(vars(config))) is not None:
            raise ModelError(
                f"The base under adapter {adapter!r} is not the model it was: {change}. Merge the adapter with PEFT "
                "(merge_and_unload), save the result, and give that as the model; or train plain LoRA."
            )
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            raise ModelError(
                f"{name} has {', '.join(layer.merged_adapters)} merged into the base's weights: unmerge it first "
                "(unmerge_adapter)."
            )


def _base_modules(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the base's modules in the order of ``named_modules``, without adapter wrappers."""
    pending: list[tuple[str, nn.Module]] = [("", base_of(model))]
    while pending:
        name, wrapped = pending.pop()
        module = without_adapters(wrapped)
        yield name, module
        children = [(f"{name}.{child}" if name else child, each) for child, each in module.named_children()]
        pending += reversed(children)


BEYOND_PLAIN_LORA = {
    "use_dora": "is DoRA",
    "lora_bias": "has biases",
    "modules_to_save": "has fully trained modules (modules_to_save)",
    "alora_invocation_tokens": "acts only after an invocation (alora_invocation_tokens)",
    "layer_replication": "repeats layers (layer_replication)",
    "trainable_token_indices": "has trained tokens (trainable_token_indices)",
    "target_parameters": "acts on parameters such as experts (target_parameters)",
    "use_qalora": "is QALoRA",
    "use_bdlora": "has block-diagonal matrices (use_bdlora)",
    "arrow_config": "routes between adapters (arrow_config)",
    "kasa_config": "is KaSA",
    "velora_config": "is VeLoRA",
    "monteclora_config": "is MonteCLoRA",
}
"""Settings of PEFT's LoRA that make an adapter more than one pair of matrices per linear layer, with descriptions."""

_SUPPORTED = frozenset({"use_dora", "modules_to_save", "trainable_token_indices", "target_parameters"})
"""Those of these settings with which adapters are trained, continued and exported, but not averaged."""

# Initializations of A and B that leave the base unchanged. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract the initial
# update ``s B₀ A₀`` from the base's weights, and PEFT does so again whenever such an adapter is added to a model.
_HARMLESS_STARTS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


def base_change(settings: Mapping[str, Any]) -> str | None:
    """Describe how an adapter changes the base's weights when it is added to a model; None if it does not.

    Args:
        settings: The content of ``adapter_config.json``, or ``vars`` of PEFT's configuration.
    """
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _HARMLESS_STARTS:
        return f"init_lora_weights={start!r} subtracts the adapter's initial update from the base's weights"
    if (bias := settings.get("bias", "none")) != "none":
        return f"bias={bias!r} replaces the base's own biases"
    if settings.get("layer_replication"):
        return "layer_replication repeats layers of the base"
    return None


def beyond_plain_lora(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield each reason why an adapter is more than pairs of matrices on linear layers over an intact base."""
    yield from (what for field, what in BEYOND_PLAIN_LORA.items() if settings.get(field))
    if (change := base_change(settings)) is not None:
        yield f"changes its base ({change})"


def unsupported(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield each reason why an adapter cannot be trained and exported."""
    yield from (what for field, what in BEYOND_PLAIN_LORA.items() if field not in _SUPPORTED and settings.get(field))
    if (change := base_change(settings)) is not None:
        yield f"changes its base ({change})"
