"""LoRA adapters: added with a reproducible initialization, or loaded."""

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from falign.choices import nearest
from falign.errors import ConfigError, ModelError, one_line
from falign.models.adapter_files import AdapterFiles, read_adapter_files
from falign.models.adapter_tensors import compute_in_activation_type
from falign.models.base_weights import base_parameters
from falign.models.lora_factors import check_plain_lora
from falign.models.patterns import check_adapter_patterns
from falign.models.recorded_base import check_recorded_base
from falign.models.sources import adapter_folder, resolve
from falign.models.staging import reading
from falign.models.structure import (
    adapter_matrix,
    adapter_weights,
    base_name,
    base_of,
    expert_modules,
    is_transposed,
    linear_modules,
    lora_layers,
)

__all__ = ["add_lora", "load_adapter", "start_from_adapter", "transplant_adapter"]


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int | float,
    seed: int,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    rslora: bool = False,
    revision: str | None = None,
) -> PeftModel:
    """Freeze ``model``, and add a trainable adapter named ``default`` with float32 weights.

    The adapter changes nothing at first (B = 0). A depends only on ``seed`` and the shapes, and not on the device, the
    base's dtype or quantization, or the global random state, which is left as it was. A quantized base needs no further
    preparation: it is not converted to float32.

    Args:
        model: The base, changed in place.
        r: Rank.
        alpha: Scale; the update is ``alpha / r · B A``, or ``alpha / √r · B A`` with ``rslora``.
        seed: Seed of A.
        dropout: Dropout probability of the adapter's input, in training.
        target_modules: ``all-linear`` (all linear layers but the output head), or endings of module names. Experts that
            are stacked in one parameter, and their router, are not linear layers and get no adapter.
        rslora: Scale by 1/√r.
        revision: The base's revision on the hub, recorded in the adapter's configuration.

    Raises:
        ConfigError: A target that is not a linear layer of this model.
    """
    linear = linear_modules(model)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    chosen = _match(targets, linear)
    if targets == "all-linear" and expert_modules(model):
        targets = _linear_beside_experts(model, linear)
    elif taken := _taken_for_experts(targets, model):
        raise ConfigError(
            f"target_modules={targets!r}: PEFT applies {sorted(taken)} to the experts of a {type(model).__name__}, "
            "which are not linear layers: leave them out."
        )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=r,
        # Declared as an integer in PEFT, which works with any number.
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=targets,
        use_rslora=rslora,
        # GPT-2's layers keep their weights transposed.
        fan_in_fan_out=any(is_transposed(linear[name]) for name in chosen),
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with reading(partial(_impossible, model)), torch.random.fork_rng(devices), _expected_warnings():
        adapted = get_peft_model(model, config, revision=revision)
    _initialize(adapted, seed=seed)
    compute_in_activation_type(adapted, "default")
    return adapted


def _impossible(model: PreTrainedModel, error: Exception) -> ConfigError:
    return ConfigError(
        f"A {type(model).__name__} cannot have this adapter: {one_line(error)} Give a list of other "
        "linear layers (adapter.target_modules in a run file)."
    )


def load_adapter(
    model: PreTrainedModel | PeftModel,
    path: str | Path,
    *,
    trainable: bool,
    name: str = "default",
    base_hash: str | None = None,
) -> PeftModel:
    """Load an adapter folder over ``model`` as adapter ``name``; the first one loaded is the active one.

    An adapter written by falign is refused over other weights than its base. An adapter written by PEFT records only
    the name of its base; a warning says if the names differ.

    Args:
        model: The base, or a model that has other adapters.
        path: The adapter's folder.
        trainable: Whether it takes gradients.
        name: Its name in the model.
        base_hash: Hash of the base by ``weights_hash``, if it is known already.

    Raises:
        ModelError: No adapter there, invalid settings, pickled, damaged or changed weights, a used name, an adapter
            that changes its base, or one for another base.
    """
    folder = Path(path).expanduser()
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise ModelError(f"{folder}: the model has an adapter {name!r} already: choose another name.")
    files = read_adapter_files(folder)
    modules = [module for module, _ in base_of(model).named_modules()]
    check_adapter_patterns(files.settings, modules, file=folder / "adapter_config.json")
    check_recorded_base(files.base, model, folder, weights=base_hash)
    own = files.tensors.keys() - _brought_along(files, model, folder)
    device, was_training = str(base_of(model).device), model.training
    with reading(lambda error: _unfit(folder, one_line(error))), _expected_warnings():
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name, is_trainable=trainable, torch_device=device)
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(
                model, folder, adapter_name=name, is_trainable=trainable, torch_device=device
            )
    stray = own ^ adapter_weights(adapted, name).keys()
    if stray:
        raise _unfit(folder, f"weights that only one of them has: {sorted(stray)[:3]}.")
    compute_in_activation_type(adapted, name)
    adapted.train(was_training)  # PEFT switches the whole model to evaluation for a frozen adapter
    return adapted


def transplant_adapter(source: PeftModel, target: PreTrainedModel, *, adapter: str = "default") -> PeftModel:
    """Add a frozen copy of ``source``'s adapter to ``target``, another copy of the base."""
    config = copy.deepcopy(source.peft_config[adapter])
    config.inference_mode = True
    config.base_model_name_or_path = None
    if isinstance(config, LoraConfig):
        config.fan_in_fan_out = any(is_transposed(module) for module in linear_modules(target).values())
    with _expected_warnings():
        adapted = get_peft_model(target, config, adapter_name=adapter)
    set_peft_model_state_dict(adapted, adapter_weights(source, adapter), adapter_name=adapter)
    compute_in_activation_type(adapted, adapter)
    return adapted


def _match(targets: str | list[str], linear: dict[str, nn.Module]) -> list[str]:
    if targets == "all-linear":
        return list(linear)
    known = sorted({name.rpartition(".")[2] for name in linear})
    if isinstance(targets, str):
        raise ConfigError(f"target_modules={targets!r}: give 'all-linear' or a list of names out of {known}.")
    chosen = []
    for target in targets:
        matching = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matching:
            close = nearest(target, known)
            hint = f" Did you mean {close!r}?" if close else ""
            raise ConfigError(
                f"target_modules: {target!r} matches no linear layer of this model.{hint} Its linear layers are "
                f"called {known}."
            )
        chosen += matching
    if not chosen:
        raise ConfigError(f"target_modules is empty: give 'all-linear' or a list of names out of {known}.")
    return chosen


def _linear_beside_experts(model: PreTrainedModel, linear: dict[str, nn.Module]) -> list[str]:
    head = model.get_output_embeddings()
    names = sorted({name.rpartition(".")[2] for name, module in linear.items() if module is not head})
    return [name for name in names if name not in _taken_for_experts(names, model)]


def _taken_for_experts(targets: str | list[str], model: PreTrainedModel) -> set[str]:
    """Return the targets that PEFT would replace by parameters of this model's experts."""
    if isinstance(targets, str) or not expert_modules(model):
        return set()
    config = LoraConfig(target_modules=targets)
    convert_peft_config_for_transformers(config, model, None)
    return set(targets) - set(config.target_modules or ())


@torch.no_grad()
def _initialize(model: PeftModel, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, layer in sorted(lora_layers(model, "default").items()):
        weight = adapter_matrix(layer.lora_A, "default")
        # The distribution of PEFT and of nn.Linear: uniform on ±1/√fan_in.
        drawn = nn.init.kaiming_uniform_(torch.empty(weight.shape), a=math.sqrt(5), generator=generator)
        weight.copy_(drawn)


@contextmanager
def _expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers for a property by its deprecated name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # `load_adapter` raises an error instead.
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        yield


def _brought_along(files: AdapterFiles, model: PreTrainedModel | PeftModel, folder: Path) -> set[str]:
    """Return the names of base weights that PEFT saved beside an adapter (save_embedding_layers), if they are equal.

    Loading would overwrite the base's own weights with them.
    """
    base, brought = base_parameters(model), set[str]()
    saved = files.settings.get("modules_to_save") or []
    for name, tensor in files.tensors.items():
        own = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if own not in base or any(f".{module}." in f".{own}" for module in saved):
            continue
        weight = base[own]
        if tensor.shape != weight.shape:
            raise ModelError(
                f"{folder} was made over a base whose {own} has shape {[*tensor.shape]}, as after a resize, "
                f"and that of this model has {[*weight.shape]}: save the resized base, and give that as the model."
            )
        if not torch.equal(tensor.to(weight), weight):
            raise ModelError(
                f"{folder} brings {own} along (PEFT's save_embedding_layers) with other values than this model has: "
                "loading would replace them in the base, and in every reference over it. Give the base with these "
                "values, or merge the adapter with PEFT (merge_and_unload) and give the merged model."
            )
        brought.add(name)
    return brought


def _unfit(folder: Path, reason: str) -> ModelError:
    return ModelError(
        f"The adapter {folder} does not fit this model: {reason} Load the base that it was made for, or restore "
        "adapter_config.json and adapter_model.safetensors from one copy."
    )


def start_from_adapter(
    model: PreTrainedModel, path: str | Path, *, dropout: float = 0.0, revision: str | None = None
) -> PeftModel:
    """Add a trainable copy of an adapter to ``model``, named ``default``, with the same rank, scale and targets.

    Args:
        model: The base, changed in place.
        path: The adapter's folder, or a run that has trained one; nothing is written there.
        dropout: Dropout probability of the adapter's input, in training.
        revision: The base's revision on the hub, recorded in the adapter's configuration.

    Raises:
        ModelError: No adapter there, one for another base, or one that is more than LoRA matrices, which could not
            be exported again.
    """
    adapted = load_adapter(model, adapter_folder(path), trainable=True)
    check_plain_lora(adapted, "default")
    config = adapted.peft_config["default"]
    assert isinstance(config, LoraConfig)
    config.lora_dropout = dropout
    config.base_model_name_or_path = resolve(base_name(model))
    config.revision = revision
    for layer in lora_layers(adapted, "default").values():
        layer.lora_dropout["default"] = nn.Dropout(dropout) if dropout else nn.Identity()
    return adapted
