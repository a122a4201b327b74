"""Export of trained models for other tools: an adapter in PEFT's layout, or merged weights."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falign.errors import ModelError
from falign.models.adapter_files import write_adapter_files
from falign.models.base_weights import check_quantized_from
from falign.models.execution import resolve_dtype
from falign.models.loading import load_model, stored_quantization
from falign.models.merging import check_supported, fold_adapter
from falign.models.new_tokens import add_rows
from falign.models.recorded_base import RecordedBase, record_base
from falign.models.sources import resolve
from falign.models.staging import staged_folder
from falign.models.structure import adapter_weights, base_name, base_of
from falign.models.tokenizers import stop_token_ids

__all__ = ["existing_rule", "export_adapter", "export_merged", "merged_model"]


def export_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    adapter: str = "default",
    base_name_or_path: str | Path | None = None,
    base: RecordedBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one adapter, the tokenizer and its chat template, and nothing else, to ``out_dir``.

    Args:
        model: The trained model; its other adapters, such as a frozen ``ref``, are not written.
        tokenizer: The tokenizer it was trained with.
        out_dir: The folder to write; it appears complete or not at all.
        adapter: Name of the adapter; never ``ref``.
        base_name_or_path: The base to record, if that is not the one it was loaded from.
        base: The record of the base's content; None reads the weights to make it.
        overwrite: Replace a folder that is not empty.

    Raises:
        ModelError: A kind of adapter that is not supported, an occupied folder, or a full disk.
    """
    if adapter == "ref":
        raise ModelError("Adapter 'ref' is the frozen reference: export the trained one, 'default'.")
    check_supported(model, adapter)
    weights = {name: tensor.cpu().contiguous() for name, tensor in adapter_weights(model, adapter).items()}
    config = copy.deepcopy(model.peft_config[adapter])
    assert isinstance(config, LoraConfig)  # it has been checked
    config.inference_mode = True
    if base_name_or_path is not None:
        config.base_model_name_or_path = resolve(base_name_or_path)
    if not config.base_model_name_or_path:
        raise ModelError("The adapter's base has no name to record: give base_name_or_path.")
    base = record_base(model) if base is None else base
    size = sum(tensor.nbytes for tensor in weights.values())
    with staged_folder(Path(out_dir), existing=existing_rule(overwrite), needed_bytes=size) as staging:
        write_adapter_files(staging, config, weights, base)
        tokenizer.save_pretrained(staging)
    return Path(out_dir)


def export_merged(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    base_name_or_path: str | Path | None = None,
    dtype: str = "auto",
    adapter: str = "default",
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_token_ids: Sequence[int] = (),
    overwrite: bool = False,
) -> Path:
    """Write plain weights with the adapter folded in, the tokenizer and its chat template to ``out_dir``.

    The adapter is folded into the base's original weights, read from disk again on the CPU, in float32, and rounded
    once. That holds for QLoRA too, where the result differs from the trained model by the base's quantization
    error. A model without adapters (full fine-tuning) gives its own weights. Generation stops where the trained model
    stops: ``generation_config`` names every stop token, the tokenizer's EOS included.

    Args:
        model: The trained model; it is not changed.
        tokenizer: The tokenizer it was trained with.
        out_dir: The folder to write; it appears complete or not at all.
        base_name_or_path: The base to fold into, if not the one it was loaded from; needed where that is stored
            quantized, and compared with it.
        dtype: Dtype of the written weights; ``auto`` is that of the base checkpoint.
        adapter: Name of the adapter.
        revision: The base's revision on the hub.
        trust_remote_code: Run code that the base's repository brings along.
        new_token_ids: Tokens that were added to the base before training.
        overwrite: Replace a folder that is not empty.

    Raises:
        ModelError: Weights that cannot be merged, a base that is not the one that was quantized, an occupied folder, or
            a full disk.
    """
    merged = merged_model(
        model,
        base_name_or_path=base_name_or_path,
        dtype=dtype,
        adapter=adapter,
        revision=revision,
        trust_remote_code=trust_remote_code,
        new_token_ids=new_token_ids,
    )
    stops = stop_token_ids(merged, tokenizer) | stop_token_ids(base_of(model), tokenizer)
    merged.generation_config = copy.deepcopy(base_of(model).generation_config)
    merged.generation_config.eos_token_id = sorted(stops)
    size = sum(parameter.nbytes for parameter in merged.parameters())
    with staged_folder(Path(out_dir), existing=existing_rule(overwrite), needed_bytes=size) as staging:
        merged.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return Path(out_dir)


def merged_model(
    model: PreTrainedModel | PeftModel,
    *,
    base_name_or_path: str | Path | None = None,
    dtype: str = "auto",
    adapter: str = "default",
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_token_ids: Sequence[int] = (),
) -> PreTrainedModel:
    """Return a new model on the CPU with the adapter folded in; arguments and errors are those of `export_merged`."""
    if isinstance(model, PeftModel):
        check_supported(model, adapter)
    wanted = resolve_dtype(dtype, device=torch.device("cpu"))
    name = base_name(model) if base_name_or_path is None else base_name_or_path
    if (stored := stored_quantization(name, revision=revision)) is not None:
        raise ModelError(
            f"{name} is stored quantized ({stored}); an adapter merged into those would be rounded away: "
            "give the 16-bit model that it was made from (`base_name_or_path`), or export the adapter."
        )
    merged = load_model(name, revision=revision, trust_remote_code=trust_remote_code, device="cpu")
    add_rows(merged, new_token_ids)
    if base_name_or_path is not None:
        check_quantized_from(merged, model)
    own = merged.dtype
    target = own if wanted is None else wanted
    _convert(merged, own, torch.promote_types(own, target))  # never rounds
    if isinstance(model, PeftModel):
        fold_adapter(merged, model, adapter=adapter)
    else:
        _copy_weights(merged, model)
    _convert(merged, torch.promote_types(own, target), target)
    return merged


def existing_rule(overwrite: bool) -> Literal["refuse", "replace"]:
    return "replace" if overwrite else "refuse"


@torch.no_grad()
def _convert(model: PreTrainedModel, from_dtype: torch.dtype, to_dtype: torch.dtype) -> None:
    # Parameters with another dtype than the model keep it on purpose (some routers need float32).
    if from_dtype == to_dtype:
        return
    for parameter in model.parameters():
        if parameter.dtype == from_dtype:
            parameter.data = parameter.data.to(to_dtype)


@torch.no_grad()
def _copy_weights(target: PreTrainedModel, source: PreTrainedModel) -> None:
    weights: dict[str, Tensor] = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            raise ModelError(
                f"{name} of the base on disk is not in the trained model with that shape: quantized weights "
                "cannot be exported without an adapter; otherwise give the base it was trained from."
            )
        parameter.copy_(weights[name])
