"""LoRA adapters: added with a reproducible initialization, or loaded."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from torch import nn
from transformers import PreTrainedModel

from falign.errors import ConfigError, ModelError, one_line
from falign.models.adapter_files import AdapterFiles, read_adapter_files
from falign.models.adapter_starts import room_for, start_adapter
from falign.models.adapter_targets import check_patterns, choose_targets, rows_of_tokens
from falign.models.adapter_tensors import check_tokens_beside, compute_in_activation_type
from falign.models.base_weights import base_parameters
from falign.models.merging import check_supported
from falign.models.patterns import check_adapter_patterns
from falign.models.recorded_base import check_recorded_base
from falign.models.sources import adapter_folder, resolve
from falign.models.staging import reading
from falign.models.structure import (
    adapter_weights,
    base_name,
    base_of,
    is_transposed,
    linear_modules,
    lora_layers,
    trained_tokens,
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
    dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] = (),
    target_parameters: Sequence[str] = (),
    start: str = "default",
    token_ids: Sequence[int] = (),
    revision: str | None = None,
) -> PeftModel:
    """Freeze ``model``, and add a trainable adapter named ``default`` with float32 weights.

    The adapter changes nothing at first. Its first values depend only on ``seed``, the shapes and, for some starts, the
    base's weights; not on the device or the global random state, which is left as it was. A quantized base needs no
    further preparation: it is not converted to float32.

    Args:
        model: The base, changed in place.
        r: Rank.
        alpha: Scale; the update is ``alpha / r · B A``, or ``alpha / √r · B A`` with ``rslora``.
        seed: Seed of A.
        dropout: Dropout probability of the adapter's input, in training.
        target_modules: ``all-linear`` (all linear layers but the output head and routers), or endings of module names.
        rslora: Scale by 1/√r.
        dora: Also train the norm of each row of the weights (DoRA).
        rank_pattern: Other ranks, by endings of layer names or regular expressions.
        alpha_pattern: Other scales, by the same.
        modules_to_save: Endings of names of modules that are trained as a whole.
        target_parameters: Endings of names of parameters that stack the matrices of experts.
        start: First values of the matrices, one of :data:`falign.models.adapter_starts.STARTS`.
        token_ids: Tokens whose rows of the embeddings and the head are trained.
        revision: The base's revision on the hub, recorded in the adapter's configuration.

    Raises:
        ConfigError: A target that this model does not have or that cannot be trained so, or settings that exclude each
            other.

    Source:
        Hu et al., LoRA (arXiv:2106.09685); Kalajdzievski, rsLoRA (arXiv:2312.03732); Liu et al., DoRA
        (arXiv:2402.09353); Meng et al., PiSSA (arXiv:2404.02948); Büyükakyüz, OLoRA (arXiv:2406.01775).
    """
    targets = choose_targets(
        model, target_modules, target_parameters=target_parameters, modules_to_save=modules_to_save
    )
    patterns = {"rank_pattern": dict(rank_pattern or {}), "alpha_pattern": dict(alpha_pattern or {})}
    check_patterns(patterns, targets.layers)
    room = room_for(start)
    widened = room**0.5 if rslora else room  # keeps the scale of each layer
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=room * r,
        # Declared as an integer in PEFT, which works with any number.
        lora_alpha=widened * alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=targets.modules,
        use_rslora=rslora,
        use_dora=dora,
        rank_pattern={key: room * rank for key, rank in patterns["rank_pattern"].items()},
        alpha_pattern={key: widened * each for key, each in patterns["alpha_pattern"].items()},
        modules_to_save=[*modules_to_save] or None,
        target_parameters=targets.parameters or None,
        trainable_token_indices=rows_of_tokens(model, token_ids, modules_to_save=modules_to_save)
        if token_ids
        else None,
        # GPT-2's layers keep their weights transposed.
        fan_in_fan_out=any(is_transposed(layer) for layer in targets.layers.values()),
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with reading(partial(_impossible, model)), torch.random.fork_rng(devices), _expected_warnings():
        adapted = get_peft_model(model, config, revision=revision)
        compute_in_activation_type(adapted, "default")
        torch.manual_seed(seed)  # for PEFT's randomized decomposition
        start_adapter(adapted, start, seed=seed)
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
    _check_rows(files, model, folder)
    if isinstance(model, PeftModel):
        check_tokens_beside(model, files.settings, place=str(folder))
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
    if files.settings.get("modules_to_save"):  # PEFT has read them in the base's type
        set_peft_model_state_dict(adapted, files.tensors, adapter_name=name)
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
    compute_in_activation_type(adapted, adapter)
    set_peft_model_state_dict(adapted, adapter_weights(source, adapter), adapter_name=adapter)
    return adapted


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
        parts = own.split(".")
        inside = [".".join(parts[:end]) for end in range(1, len(parts))]
        if own not in base or any(place.endswith(module) for place in inside for module in saved):  # PEFT's rule
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


def _check_rows(files: AdapterFiles, model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Refuse an adapter that trains tokens for which the base has no row."""
    given = files.settings.get("trainable_token_indices") or {}
    ids = [id_ for each in (given.values() if isinstance(given, dict) else [given]) for id_ in each]
    rows = base_of(model).config.get_text_config().vocab_size
    if ids and max(ids) >= rows:
        raise ModelError(
            f"{folder} trains tokens up to the id {max(ids)}, and the model has {rows} rows of embeddings: give the "
            "same model.new_tokens as in its training, or call `model.resize_token_embeddings(len(tokenizer))` with "
            "the tokenizer in its folder."
        )


def _unfit(folder: Path, reason: str) -> ModelError:
    return ModelError(
        f"The adapter {folder} does not fit this model: {reason} Load the base that it was made for, or restore "
        "adapter_config.json and adapter_model.safetensors from one copy."
    )


def start_from_adapter(
    model: PreTrainedModel,
    path: str | Path,
    *,
    dropout: float = 0.0,
    revision: str | None = None,
    token_ids: Sequence[int] = (),
) -> PeftModel:
    """Add a trainable copy of an adapter to ``model``, named ``default``, with the same settings.

    Args:
        model: The base, changed in place.
        path: The adapter's folder, or a run that has trained one; nothing is written there.
        dropout: Dropout probability of the adapter's input, in training.
        revision: The base's revision on the hub, recorded in the adapter's configuration.
        token_ids: Tokens that the adapter must train, because they are new in this model.

    Raises:
        ModelError: No adapter there, one for another base, or one of a kind that could not be exported again.
        ConfigError: Dropout for an adapter on the parameters of experts, or one that does not train the new tokens.
    """
    adapted = load_adapter(model, adapter_folder(path), trainable=True)
    check_supported(adapted, "default")
    config = adapted.peft_config["default"]
    assert isinstance(config, LoraConfig)
    trained = {id_ for ids, _ in trained_tokens(adapted, "default").values() for id_ in ids}
    if missing := sorted({*token_ids} - trained):
        raise ConfigError(
            f"new_tokens: {path} does not train the rows of the new tokens (first: id {missing[0]}), and would leave "
            "them at their mean: start a new adapter, or merge this one and give the result as the model."
        )
    if dropout and config.target_parameters:
        raise ConfigError(
            f"dropout={dropout}: {path} acts on the parameters of experts, whose input has no dropout: leave it out."
        )
    config.lora_dropout = dropout
    config.base_model_name_or_path = resolve(base_name(model))
    config.revision = revision
    for layer in lora_layers(adapted, "default").values():
        layer.lora_dropout["default"] = nn.Dropout(dropout) if dropout else nn.Identity()
    return adapted
