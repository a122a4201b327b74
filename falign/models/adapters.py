"""LoRA adapters: added with a reproducible start, or loaded; full fine-tuning is the model without one."""

import copy
import difflib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from falign.errors import ConfigError, ModelError
from falign.models.adapter_precision import compute_in_activation_type
from falign.models.adapter_settings import base_change
from falign.models.foreign import reading
from falign.models.sources import adapter_config, damaged
from falign.models.structure import (
    adapter_matrix,
    adapter_weights,
    base_of,
    expert_modules,
    is_transposed,
    linear_modules,
    lora_layers,
)

__all__ = ["add_lora", "check_adapter_folder", "load_adapter", "transplant_adapter"]

_WEIGHTS = "adapter_model.safetensors"


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
    """Freeze ``model`` and give it a trainable adapter named ``default``, with float32 weights.

    The adapter changes nothing at first (B = 0). A depends on ``seed`` and the shapes only: not on the device, on
    the base's type or quantisation, nor on the global random state, which is left as it was. A quantised base needs
    no further preparation: nothing of it is converted to float32.

    Args:
        model: the base, changed in place.
        r: rank.
        alpha: scale; the update is ``alpha / r · B A``, or ``alpha / √r · B A`` with ``rslora``.
        seed: of A.
        dropout: on the adapter's input, while training.
        target_modules: ``all-linear`` (all linear layers but the output head), or endings of module names. Experts that
            are stacked in one parameter, and their router, are not linear layers and stay as they are.
        rslora: scale by 1/√r.
        revision: the base's revision on the hub, to be recorded in the adapter's configuration.

    Raises:
        ConfigError: a target that is no linear layer of this model.
    """
    linear = linear_modules(model)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    chosen = _match(targets, linear)
    if targets == "all-linear" and expert_modules(model):
        targets = _linear_beside_experts(model, linear)
    elif taken := _taken_for_experts(targets, model):
        raise ConfigError(
            f"target_modules={targets!r}: PEFT takes {sorted(taken)} for the experts of a {type(model).__name__}, "
            "which are not linear layers: leave them out."
        )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=r,
        # PEFT declares an integer, and applies and stores any number.
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=targets,
        use_rslora=rslora,
        # GPT-2's layers keep their weights transposed.
        fan_in_fan_out=any(is_transposed(linear[name]) for name in chosen),
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _expected_warnings():
        adapted = get_peft_model(model, config, revision=revision)
    _initialise(adapted, seed=seed)
    compute_in_activation_type(adapted, "default")
    return adapted


def load_adapter(
    model: PreTrainedModel | PeftModel, path: str | Path, *, trainable: bool, name: str = "default"
) -> PeftModel:
    """Load an adapter folder over ``model`` as adapter ``name``; the first one loaded is the active one.

    Raises:
        ModelError: no adapter there, pickled weights, a name in use, or weights that are not this model's.
    """
    folder = Path(path).expanduser()
    check_adapter_folder(folder)
    device, was_training = str(base_of(model).device), model.training
    with reading(lambda error: _unfit(folder, " ".join(str(error).split())[:400])), _expected_warnings():
        if isinstance(model, PeftModel):
            if name in model.peft_config:
                raise ModelError(f"{folder}: the model has an adapter {name!r} already: choose another name.")
            model.load_adapter(str(folder), name, is_trainable=trainable, torch_device=device)
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(
                model, folder, adapter_name=name, is_trainable=trainable, torch_device=device
            )
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        stray = set(file.keys()) ^ set(adapter_weights(adapted, name))
    if stray:
        raise _unfit(folder, f"weights that only one of them has: {sorted(stray)[:3]}.")
    compute_in_activation_type(adapted, name)
    adapted.train(was_training)  # PEFT switches the whole model to evaluation for a frozen adapter
    return adapted


def transplant_adapter(source: PeftModel, target: PreTrainedModel, *, adapter: str = "default") -> PeftModel:
    """Give ``target``, another copy of the base, a copy of ``source``'s adapter, in memory and frozen."""
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
            nearest = difflib.get_close_matches(target, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
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
def _initialise(model: PeftModel, *, seed: int) -> None:
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
        # `load_adapter` makes an error of this one.
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        yield


def check_adapter_folder(folder: Path) -> None:
    """Raise unless a folder holds a LoRA adapter in safetensors.

    Raises:
        ModelError: no adapter there, one of another type or that changes its base, or weights that are pickled or
            damaged.
    """
    config = folder / "adapter_config.json"
    if not config.is_file():
        nearest = []
        if folder.parent.is_dir() and not folder.is_dir():
            nearest = difflib.get_close_matches(folder.name, [entry.name for entry in folder.parent.iterdir()], n=1)
        hint = f"did you mean {folder.parent / nearest[0]}?" if nearest else "give a folder in PEFT's layout."
        raise ModelError(f"{folder} holds no adapter (no adapter_config.json): {hint}")
    settings = adapter_config(folder)
    peft_type = settings.get("peft_type")
    if peft_type != "LORA":
        raise ModelError(f"{folder} holds a {peft_type} adapter; only LORA is supported.")
    if (change := base_change(settings)) is not None:
        raise ModelError(
            f"{config}: {change}, so that nothing could be compared with the base, averaged or exported over it. Merge "
            "the adapter with PEFT (merge_and_unload), save the result, and give that as the model."
        )
    if not (folder / _WEIGHTS).is_file():
        raise ModelError(
            f"{folder} has no {_WEIGHTS}. Pickled weights can run code when they are read and are never loaded: load "
            "such an adapter once where you trust it and `save_pretrained` it again."
        )
    with reading(lambda error: damaged(folder / _WEIGHTS, error)), safe_open(folder / _WEIGHTS, framework="pt"):
        pass


def _unfit(folder: Path, reason: str) -> ModelError:
    return ModelError(f"The adapter {folder} does not fit this model: {reason} Load the base that it was made for.")
