"""The base under a model's adapters: its weights, by their names in the model without adapters."""

import math
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from falign.errors import ModelError
from falign.models.adapter_settings import base_change
from falign.models.structure import base_of, is_transposed, without_adapters

__all__ = ["base_parameters", "base_storage", "base_weights", "check_base_intact", "check_quantized_from"]

_ROUNDING = 0.3  # share of a weight's norm; nf4 rounding is 0.09 for normal weights, another model differs by 1.4


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
    """Raise unless the 4-bit weights of a base are the rounded weights of another model.

    Raises:
        ModelError: Names the first weight that is not.
    """
    stored = {name: each for name, each in base_parameters(model).items() if "quant_state" in vars(each)}
    if not stored:
        return
    from bitsandbytes.functional import dequantize_4bit  # slow to import, and needed here alone

    modules = dict(original.named_modules())
    for name, packed in stored.items():
        restored = dequantize_4bit(packed.data, vars(packed)["quant_state"]).cpu().float()
        # bitsandbytes packs the weight as (out, in); Conv1D stores the original as (in, out).
        module, share = modules.get(name.removesuffix(".weight")), math.inf
        if isinstance(module, nn.Linear | Conv1D):
            weight = (module.weight.T if is_transposed(module) else module.weight).cpu().float()
            share = float((restored - weight).norm() / weight.norm()) if restored.shape == weight.shape else math.inf
        if not share <= _ROUNDING:
            raise ModelError(
                f"{original.name_or_path} is not the model that {base_of(model).name_or_path} was quantized from: "
                f"{name} differs by {share:.0%} of its norm, where 4 bits explain {_ROUNDING:.0%}. Give that model."
            )


def check_base_intact(model: nn.Module) -> None:
    """Raise if adapters have changed the base's own weights.

    Raises:
        ModelError: Names the adapter and how it changed them.
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
