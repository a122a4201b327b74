"""Adapters outside of a model: configuration and matrices, with the names in PEFT's files."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig, PeftModel, TaskType, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from falign.errors import ModelError
from falign.models.adapter_files import read_adapter_files
from falign.models.adapter_modules import CastLinear, ExactDora, keep_float32
from falign.models.base_weights import beyond_plain_lora
from falign.models.lora_factors import Factors
from falign.models.recorded_base import RecordedBase
from falign.models.sources import damaged
from falign.models.staging import reading
from falign.models.structure import PREFIX, linear_modules, lora_layers, saved_modules, trained_tokens

__all__ = [
    "AdapterTensors",
    "adapter_of",
    "check_tokens_beside",
    "compute_in_activation_type",
    "install_adapter",
    "read_adapter",
]


_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


class AdapterTensors(NamedTuple):
    """A plain LoRA adapter.

    Attributes:
        config: PEFT's configuration.
        tensors: Its matrices, on the CPU.
        base: The recorded base that it was made for.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    base: RecordedBase = RecordedBase()

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) of each layer, by its name in the base."""
        return {layer: (len(up), down.shape[1]) for layer, (up, down) in self._pairs().items()}

    def factors(self) -> dict[str, Factors]:
        """Return the update of each layer in float32, by its name in the base."""
        return {
            layer: Factors(self._scale(layer, len(down)) * up.float(), down.float())
            for layer, (up, down) in self._pairs().items()
        }

    def _pairs(self) -> dict[str, Factors]:
        layers = [name.removesuffix(_DOWN) for name in self.tensors if name.endswith(_DOWN)]
        return {
            layer.removeprefix(PREFIX): Factors(self.tensors[layer + _UP], self.tensors[layer + _DOWN])
            for layer in layers
        }

    def _scale(self, layer: str, rank: int) -> float:
        patterns = self.config.alpha_pattern or {}
        alpha = patterns.get(get_pattern_key(list(patterns), layer), self.config.lora_alpha)
        return alpha / (rank**0.5 if self.config.use_rslora else rank)


def read_adapter(folder: Path) -> AdapterTensors:
    """Read an adapter folder without the base.

    Raises:
        ModelError: No adapter there, or one with more than pairs of LoRA matrices on linear layers.
    """
    _, tensors, base = read_adapter_files(folder)
    with reading(lambda error: damaged(folder / "adapter_config.json", error)):
        config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)  # the files have been checked
    for what in beyond_plain_lora(vars(config)):
        raise ModelError(
            f"{folder} {what}: only plain LoRA, pairs of matrices on linear layers, can be summed (see "
            "adapter_config.json)."
        )
    layers = {name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)}
    stray = tensors.keys() - {layer + end for layer in layers for end in (_DOWN, _UP)}
    unpaired = sorted(layer for layer in layers if layer + _UP not in tensors)
    brought = {name for name in stray if ".lora_" not in name}
    if unpaired or stray - brought or not layers:
        first = [*sorted(stray - brought), *unpaired, "no matrices at all"][0]
        raise ModelError(
            f"{folder} is not plain LoRA ({first} in adapter_model.safetensors): only pairs of matrices on linear "
            "layers can be summed."
        )
    if brought:
        raise ModelError(
            f"{folder} has {min(brought)} of its base in adapter_model.safetensors (PEFT's save_embedding_layers), "
            "which cannot be averaged here. If it equals the base's, load the adapter over the base with PEFT and save "
            "it again by save_pretrained(..., save_embedding_layers=False); else merge each member (merge_and_unload) "
            "and average the merged models."
        )
    for layer in layers:
        down, up = tensors[layer + _DOWN].shape, tensors[layer + _UP].shape
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            raise damaged(folder / "adapter_model.safetensors", f"{layer} has matrices of {[*up]} and {[*down]}")
    return AdapterTensors(config, tensors, base)


def adapter_of(factors: Mapping[str, Factors], *, base: str | None, transposed: bool) -> AdapterTensors:
    """Return the adapter with these updates, with ``alpha = r``, so that PEFT does not scale them again.

    Args:
        factors: Updates by the names of their layers in the base; ranks may differ.
        base: The base to record.
        transposed: The base stores its weights as (in, out), as GPT-2 does.
    """
    ranks = {name: len(each.down) for name, each in factors.items()}
    largest = max(ranks.values())
    other = {name: rank for name, rank in sorted(ranks.items()) if rank != largest}
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        r=largest,
        lora_alpha=largest,
        target_modules=sorted(ranks),
        rank_pattern=dict(other),
        alpha_pattern=dict(other),
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    tensors = {}
    for name, each in factors.items():
        tensors[f"{PREFIX}{name}{_DOWN}"] = each.down.contiguous()
        tensors[f"{PREFIX}{name}{_UP}"] = each.up.contiguous()
    return AdapterTensors(config, tensors)


def install_adapter(model: PeftModel, adapter: AdapterTensors, *, name: str) -> None:
    """Add a frozen, inactive adapter to a model, and leave its other adapters unchanged.

    Raises:
        ModelError: The name is in use, or the adapter is for another base.
    """
    if name in model.peft_config:
        raise ModelError(f"The model has an adapter {name!r} already: choose another name.")
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    _check_shapes(adapter, base)
    check_tokens_beside(model, vars(adapter.config), place=f"The adapter for {name!r}")
    # PEFT changes which parameters train when it adds an adapter; this is undone below.
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config = copy.deepcopy(adapter.config)
    config.inference_mode = True
    with warnings.catch_warnings():
        # The same remark as for the policy's own adapter, which has been reported.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        model.add_adapter(name, config)
    compute_in_activation_type(model, name)  # first, so that the tensors are not rounded
    set_peft_model_state_dict(model, adapter.tensors, adapter_name=name)
    for parameter in model.parameters():
        parameter.requires_grad_(trainable.get(parameter, False))


def check_tokens_beside(model: PeftModel, settings: Mapping[str, Any], *, place: str) -> None:
    """Refuse an adapter without trained tokens beside one with them, which PEFT 0.21 cannot read or write.

    Raises:
        ModelError: The adapter has none, and another one has.
    """
    if settings.get("trainable_token_indices"):
        return
    with_tokens = next((name for name in model.peft_config if trained_tokens(model, name)), None)
    if with_tokens is not None:
        raise ModelError(
            f"{place} trains no tokens, and {with_tokens!r} beside it does (model.new_tokens): PEFT cannot hold both. "
            "Give an adapter that trains the same tokens, or merge it and give the merged model as a frozen reference."
        )


def _check_shapes(adapter: AdapterTensors, base: PreTrainedModel) -> None:
    layers = {name.removesuffix(".base_layer"): layer for name, layer in linear_modules(base).items()}
    for name, wanted in adapter.shapes().items():
        if name not in layers and adapter.config.target_parameters:
            continue  # experts
        if name not in layers:
            raise ModelError(f"The adapter changes {name}, which is not a linear layer here: give its own base.")
        shape = _shape(layers[name])
        if shape != wanted:
            raise ModelError(
                f"{name} is {shape} in this model and {wanted} in the adapter: give the adapter's own base."
            )


def _shape(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    assert isinstance(layer, nn.Linear)  # also 4-bit layers; their packed weights have another shape
    return layer.out_features, layer.in_features


def compute_in_activation_type(model: PeftModel, adapter: str) -> None:
    """Cast LoRA matrices to the dtype of their input; PEFT casts the input to theirs.

    The matrices stay float32 for the optimizer, and are small. The inputs are large: a float32 copy would be kept for
    the backward pass of each layer that reads them, and multiplied several times as slowly. This is what
    mixed-precision training does, without its context. Over float32 weights nothing changes. Modules that are trained
    as a whole are converted to float32 in the same way, and DoRA's norms are computed in float32.
    """
    for layer in lora_layers(model, adapter).values():
        layer.cast_input_dtype_enabled = False
        for matrices in (layer.lora_A, layer.lora_B):
            matrix = matrices[adapter]
            if type(matrix) is nn.Linear:
                matrix.__class__ = CastLinear  # the same parameters under the same names
        if adapter in layer.lora_magnitude_vector:
            magnitudes = layer.lora_magnitude_vector[adapter]
            magnitudes.__class__ = ExactDora
            keep_float32(magnitudes)
    for module in saved_modules(model, adapter).values():
        keep_float32(module)
