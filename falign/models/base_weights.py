"""The base under a model's adapters: its weights, by the names that they have in the model without adapters."""

from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from falign.errors import ModelError
from falign.models.adapter_settings import base_change
from falign.models.structure import base_of, without_adapters

__all__ = ["base_parameters", "base_storage", "base_weights", "check_base_intact"]


def base_weights(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and persistent buffers of the base, whatever its adapters wrap; tied weights come once.

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
    """Return the parameters of the base by their names in it; tied ones are there under each of their names."""
    return {
        own: parameter
        for name, module in _base_modules(model)
        for own, parameter in module.named_parameters(name, recurse=False, remove_duplicate=False)
    }


def base_storage(model: PreTrainedModel | PeftModel) -> str:
    """Return the types of the base's weights, as far as they tell two hashes of one base apart."""
    kinds = {_kind(parameter) for parameter in base_parameters(model).values()}
    return " ".join(sorted(kinds))


def _kind(parameter: nn.Parameter) -> str:
    state = vars(parameter).get("quant_state")
    return str(parameter.dtype).removeprefix("torch.") if state is None else str(state.quant_type)


def check_base_intact(model: nn.Module) -> None:
    """Raise if adapters have changed the base's own weights.

    Raises:
        ModelError: With the adapter and how it changed them.
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
    """Yield the base's modules in the order of ``named_modules``, as if there were no adapters."""
    pending: list[tuple[str, nn.Module]] = [("", base_of(model))]
    while pending:
        name, wrapped = pending.pop()
        module = without_adapters(wrapped)
        yield name, module
        children = [(f"{name}.{child}" if name else child, each) for child, each in module.named_children()]
        pending += reversed(children)
