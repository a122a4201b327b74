"""The parts of a model that an adapter changes: linear layers, parameters of experts, whole modules, rows of tokens."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from falign.choices import nearest
from falign.errors import ConfigError
from falign.models.structure import expert_modules, linear_modules

__all__ = ["Targets", "check_patterns", "choose_targets", "rows_of_tokens"]


class Targets(NamedTuple):
    """The targets of an adapter.

    Attributes:
        modules: PEFT's ``target_modules``.
        parameters: PEFT's ``target_parameters``.
        layers: The linear layers by their names in the model.
    """

    modules: str | list[str]
    parameters: list[str]
    layers: dict[str, nn.Module]


def choose_targets(
    model: PreTrainedModel,
    target_modules: str | Sequence[str],
    *,
    target_parameters: Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
) -> Targets:
    """Find the targets of an adapter in a model.

    Args:
        model: The base.
        target_modules: ``all-linear``, or endings of names of linear layers.
        target_parameters: Endings of names of stacked parameters, such as ``experts.down_proj``.
        modules_to_save: Endings of names of modules that are trained as a whole.

    Raises:
        ConfigError: A name that matches nothing of its kind, a router, or a module with two ways of training.
    """
    linear, routers = linear_modules(model), _routers(model)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    parameters = _match_parameters(list(target_parameters), model)
    chosen = [] if parameters and targets == [] else _match(targets, linear)
    if targets == "all-linear":  # PEFT leaves the head out
        chosen = [name for name in chosen if linear[name] is not model.get_output_embeddings()]
    if targets == "all-linear" and expert_modules(model):
        targets = _linear_beside_experts(model, linear, routers)
        chosen = _match(targets, linear)
    elif taken := _taken_for_experts(targets, model):
        raise ConfigError(
            f"target_modules={targets!r}: PEFT applies {sorted(taken)} to the experts of a {type(model).__name__}, "
            "which are not linear layers: leave them out, and name their parameters under target_parameters."
        )
    elif router := next((name for name in chosen if name in routers), None):
        raise ConfigError(
            f"target_modules={targets!r}: {router} is the router of a mixture of experts, and an adapter would change "
            "which experts answer: leave it out."
        )
    saved = _match_saved(list(modules_to_save), model)
    inside = [name for name in chosen if any(f"{name}.".startswith(f"{module}.") for module in saved)]
    if inside and isinstance(target_modules, str):
        targets = chosen = [name for name in chosen if name not in inside]
    elif inside:
        raise ConfigError(
            f"modules_to_save={[*modules_to_save]} and target_modules={targets!r} both have {inside[0]}: a module is "
            "trained as a whole or has an adapter; leave it out of one of them."
        )
    return Targets(targets, parameters, {name: linear[name] for name in chosen})


def check_patterns(patterns: Mapping[str, Iterable[str]], layers: Iterable[str]) -> None:
    """Refuse patterns of names that match no layer of the adapter.

    Args:
        patterns: The keys of ``rank_pattern`` and ``alpha_pattern``, by these names.
        layers: Names of the adapted layers.

    Raises:
        ConfigError: A pattern matches none; the message names it.
    """
    names = list(layers)
    for field, keys in patterns.items():
        for key in keys:
            if any(_matches(key, name) for name in names):
                continue
            endings = sorted({name.rpartition(".")[2] for name in names})
            close = nearest(key, endings)
            raise ConfigError(
                f"{field}: {key!r} matches no layer of the adapter.{f' Did you mean {close!r}?' if close else ''} Its "
                f"layers end in {endings}."
            )


def rows_of_tokens(
    model: PreTrainedModel, token_ids: Sequence[int], *, modules_to_save: Sequence[str] = ()
) -> dict[str, list[int]]:
    """Return PEFT's ``trainable_token_indices``: rows of the embeddings, and of a head with weights of its own.

    Raises:
        ConfigError: Embeddings that are trained as a whole share their weights with the head.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    saved = _match_saved(list(modules_to_save), model)
    tied = head is not None and head.weight is embeddings.weight
    ends = [names[id(each)] for each in ([embeddings] if tied or head is None else [embeddings, head])]
    own = [name for name in ends if name not in saved]
    if tied and head is not None and {names[id(embeddings)], names[id(head)]} & {*saved}:
        raise ConfigError(
            f"modules_to_save={[*modules_to_save]}: embeddings and head of this {type(model).__name__} share weights, "
            "and the rows of the new tokens are trained in both: leave these modules out."
        )
    return {name: list(token_ids) for name in own}


def _matches(key: str, name: str) -> bool:
    # PEFT takes the name itself for its key if none of the patterns matches.
    return name == key or get_pattern_key([key, "\0"], name) == key


def _match(targets: str | list[str], linear: Mapping[str, nn.Module]) -> list[str]:
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


def _match_parameters(targets: list[str], model: PreTrainedModel) -> list[str]:
    """Check that each target is a stack of matrices, as the experts of a mixture have them."""
    experts = [
        f"{place}.{name}"
        for place in expert_modules(model)
        for name, parameter in model.get_submodule(place).named_parameters(recurse=False)
        if parameter.ndim == 3
    ]
    known = sorted({".".join(name.split(".")[-2:]) for name in experts})
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in experts):
            continue
        close = nearest(target, known)
        hint = f" Did you mean {close!r}?" if close else ""
        raise ConfigError(
            f"target_parameters: {target!r} is not the parameter of experts in this model.{hint} Its experts have "
            f"{known}; their router is not trained, and other layers are named under target_modules."
            if known
            else f"target_parameters: a {type(model).__name__} has no experts: name its layers under target_modules."
        )
    return targets


def _match_saved(targets: list[str], model: PreTrainedModel) -> list[str]:
    modules = {name: module for name, module in model.named_modules() if name}
    with_weights = {name: module for name, module in modules.items() if any(True for _ in module.parameters())}
    known = sorted({name.rpartition(".")[2] for name in with_weights} - {str(i) for i in range(1000)})
    found = []
    for target in targets:
        # PEFT compares the ends of names without their dots.
        matching = [name for name in modules if name.endswith(target)]
        if not matching or any(name != target and not name.endswith(f".{target}") for name in matching):
            close = nearest(target, known)
            longer = next((name for name in matching if not f".{name}".endswith(f".{target}")), None)
            reason = "matches no module of this model"
            if longer is not None:
                reason = f"would also train {longer}, which PEFT takes for a match; give longer names"
            raise ConfigError(
                f"modules_to_save: {target!r} {reason}.{f' Did you mean {close!r}?' if close else ''} Modules are "
                f"called {known}."
            )
        for name in matching:
            if isinstance(modules[name], nn.ModuleList | nn.ModuleDict) or name not in with_weights:
                raise ConfigError(f"modules_to_save: {name} is a list of modules or has no weights: name its members.")
            if any("quant_state" in vars(weight) for weight in modules[name].parameters()):
                raise ConfigError(f"modules_to_save: {name} is quantized, and such weights do not train: leave it out.")
        found += matching
    return found


def _linear_beside_experts(
    model: PreTrainedModel, linear: Mapping[str, nn.Module], routers: Iterable[str]
) -> list[str]:
    head = model.get_output_embeddings()
    left_out = {name.rpartition(".")[2] for name in routers}
    names = sorted({name.rpartition(".")[2] for name, module in linear.items() if module is not head} - left_out)
    return [name for name in names if name not in _taken_for_experts(names, model)]


def _routers(model: PreTrainedModel) -> list[str]:
    """Return the linear layers that choose experts: beside a stack of matrices, with one output for each of these."""
    linear, found = linear_modules(model), []
    for place in expert_modules(model):
        stack = next(each for each in model.get_submodule(place).parameters(recurse=False) if each.ndim == 3)
        beside = f"{place.rpartition('.')[0]}."
        found += [
            name
            for name, layer in linear.items()
            if name.startswith(beside) and vars(layer).get("out_features") == len(stack)
        ]
    return found


def _taken_for_experts(targets: str | list[str], model: PreTrainedModel) -> set[str]:
    """Return the targets that PEFT would replace by parameters of this model's experts."""
    if isinstance(targets, str) or not targets or not expert_modules(model):
        return set()
    config = LoraConfig(target_modules=targets)
    convert_peft_config_for_transformers(config, model, None)
    return set(targets) - set(config.target_modules or ())
