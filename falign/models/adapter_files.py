"""The files of an adapter: every value is checked when they are read; a digest and the base are recorded."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from falign.choices import nearest
from falign.errors import ModelError
from falign.models.base_weights import base_change
from falign.models.identity import add_tensor
from falign.models.patterns import check_adapter_patterns
from falign.models.recorded_base import RecordedBase
from falign.models.sources import adapter_config, damaged
from falign.models.staging import reading, save_tensors

__all__ = ["AdapterFiles", "read_adapter_files", "write_adapter_files"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_RECORD = "falign"  # in the metadata of the weights, which PEFT and servers do not read

# Settings that do not change what an adapter computes. Dropout acts only in training, where it is a setting of the run.
_NOT_COMPUTED_WITH = frozenset(
    {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping", "lora_dropout"}
    | {"task_type", "megatron_core", "runtime_config"}
)


class AdapterFiles(NamedTuple):
    """The content of an adapter folder.

    Attributes:
        settings: Content of ``adapter_config.json``.
        tensors: Weights on the CPU, by PEFT's names.
        base: The base it was made for.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    base: RecordedBase


def read_adapter_files(folder: Path) -> AdapterFiles:
    """Read a LoRA adapter in safetensors, and check it.

    Raises:
        ModelError: No adapter there, another type of adapter, one that changes its base, pickled or damaged weights, an
            invalid setting, or files that do not belong together.
    """
    settings = _read_settings(folder)
    weights = folder / _WEIGHTS
    if not weights.is_file():
        raise ModelError(
            f"{folder} has no {_WEIGHTS}. Pickled weights can run code when they are read and are never loaded: load "
            "such an adapter once where you trust it and `save_pretrained` it again."
        )
    with reading(lambda error: damaged(weights, error)), safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        record = dict(json.loads((file.metadata() or {}).get(_RECORD, "{}")))
    if not tensors:
        raise damaged(weights, "it holds no weights")
    layers = [name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors]
    check_adapter_patterns(settings, layers, file=folder / _CONFIG)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() == 0 or not bool(tensor.isfinite().all()):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise damaged(weights, f"{name}, {kind} of shape {[*tensor.shape]}, is empty, NaN, infinite or an integer")
    if not settings.get("target_parameters"):  # those of experts stack several ranks in one matrix
        _check_ranks(folder, settings, tensors)
    if "adapter" in record and record["adapter"] != _digest(settings, tensors, record):
        raise ModelError(
            f"{folder}: {_CONFIG} or {_WEIGHTS} has changed since it was written: a weight, or a setting that changes "
            "the update (r, lora_alpha, use_rslora, target_modules ...). Restore both files from one copy; to change "
            "an adapter on purpose, load it with PEFT and save it again."
        )
    base = RecordedBase(
        settings.get("base_model_name_or_path"), settings.get("revision"), record.get("base"), record.get("storage")
    )
    return AdapterFiles(settings, tensors, base)


def write_adapter_files(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], base: RecordedBase) -> None:
    """Write an adapter into an existing folder, in PEFT's layout."""
    config.save_pretrained(str(folder))
    record = {"base": base.weights, "storage": base.storage}
    digest = _digest(adapter_config(folder), tensors, record)
    metadata = {"format": "pt", _RECORD: json.dumps({"adapter": digest, **record})}
    save_tensors(tensors, folder / _WEIGHTS, metadata=metadata)


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG
    if not file.is_file():
        close = None
        if folder.parent.is_dir() and not folder.is_dir():
            close = nearest(folder.name, [entry.name for entry in folder.parent.iterdir()])
        hint = f"did you mean {folder.parent / close}?" if close else "give a folder in PEFT's layout."
        raise ModelError(f"{folder} holds no adapter (no {_CONFIG}): {hint}")
    settings = adapter_config(folder)
    if settings.get("peft_type") != "LORA":
        raise ModelError(f"{file}: peft_type={settings.get('peft_type')!r}, and only LORA is supported.")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for key, value in settings.items():
        if key not in known and value:
            close = nearest(key, sorted(known))
            hint = f" Did you mean {close!r}?" if close else ""
            raise ModelError(f"{file}: this version of PEFT does not know {key}={value!r} and would ignore it.{hint}")
    for key, (valid, requirement) in _SETTINGS.items():
        value = settings.get(key, _MISSING.get(key))
        if not valid(value):
            raise ModelError(f"{file}: {key}={value!r}: {requirement}. Restore the file from a copy.")
    if (change := base_change(settings)) is not None:
        raise ModelError(
            f"{file}: {change}, so that nothing could be compared with the base, averaged or exported over it. Merge "
            "the adapter with PEFT (merge_and_unload), save the result, and give that as the model."
        )
    return settings


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # pyright: ignore[reportArgumentType]


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _are_names(value: object) -> bool:
    return value is None or isinstance(value, str) or _is_list_of(value, str)


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def _maps_to(valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(valid(each) for each in value.values()))


# Settings that PEFT does not check, or for which its error does not name the file. The first two are required.
_SETTINGS: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, "the rank is an integer of at least 1"),
    "lora_alpha": (_is_number, "the scale is a finite number"),
    "rank_pattern": (_maps_to(_is_rank), "it maps names of modules to ranks"),
    "alpha_pattern": (_maps_to(_is_number), "it maps names of modules to numbers"),
    "target_modules": (_are_names, "it is a name or a list of names"),
    "exclude_modules": (_are_names, "it is a name or a list of names"),
    "modules_to_save": (_are_names, "it is a list of names"),
    "target_parameters": (_are_names, "it is a list of names"),
    "init_lora_weights": (lambda value: value is None or isinstance(value, bool | str), "it is true, false or a name"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "it is 'none', 'all' or 'lora_only'"),
    "task_type": (lambda value: value in (None, "CAUSAL_LM"), "only causal language models (CAUSAL_LM) are supported"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "it is a number from 0 to below 1"),  # pyright: ignore
    "layers_to_transform": (
        lambda value: value is None or type(value) is int or _is_list_of(value, int),
        "it is a number or a list of numbers",
    ),
    "layers_pattern": (_are_names, "it is a name or a list of names"),
    "base_model_name_or_path": (lambda value: value is None or isinstance(value, str), "it is a name or a path"),
    "revision": (lambda value: value is None or isinstance(value, str), "it is a name"),
    **{
        flag: (_is_flag, "it is true or false")
        for flag in ("use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "inference_mode")
    },
}
_MISSING: dict[str, Any] = {"bias": "none", "lora_dropout": 0.0}  # PEFT's defaults


def _check_ranks(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    patterns = settings.get("rank_pattern") or {}
    for name, tensor in tensors.items():
        # A is (r, in) and B is (out, r): the rank is dimension 0 of A and dimension 1 of B.
        layer, matrix, _ = name.partition(".lora_A.weight")
        dim = 0
        if not matrix:
            layer, matrix, _ = name.partition(".lora_B.weight")
            dim = 1
        if not matrix or tensor.ndim != 2:
            continue
        with reading(lambda error: damaged(folder / _CONFIG, error)):
            rank = patterns.get(get_pattern_key(list(patterns), layer), settings["r"])
        if tensor.shape[dim] != rank:
            raise ModelError(
                f"{folder}: r={rank} in {_CONFIG} and {name} of shape {[*tensor.shape]} in {_WEIGHTS} do not belong "
                "together: restore both files from one copy."
            )


def _digest(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    computed_with = {
        key: sorted(map(str, value)) if isinstance(value, list) else value
        for key, value in settings.items()
        if value and key not in _NOT_COMPUTED_WITH
    }
    parts = [computed_with, record.get("base"), record.get("storage")]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        add_tensor(digest, name, tensor)
    return digest.hexdigest()
