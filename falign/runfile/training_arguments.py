"""The section ``training.extra``: arguments of the transformers trainer for which the run file has no field."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from falign.choices import nearest, require_choice, shown
from falign.errors import ConfigError
from falign.foreign.names import FOREIGN_NAMES

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from falign.runfile.training_config import TrainingConfig

__all__ = ["EXTRA", "OBSERVE", "check_effects", "extra_arguments"]

EXTRA = tuple(sorted(name for name, each in FOREIGN_NAMES.items() if each.fields == (f"training.extra.{name}",)))
"""Arguments that a run file may give. All others are fields of the section ``training``, or have an entry in
:data:`falign.foreign.names.FOREIGN_NAMES`: where the setting is, or why there is none."""

OBSERVE = frozenset(
    {
        *("dataloader_pin_memory", "eval_delay", "log_level", "logging_first_step", "project", "run_name"),
        *("torch_empty_cache_steps", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"),
    }
)
"""Those that change no step, so that a run may resume with others."""

PLACE, OF_THE_RUN = "training.extra", ("output_dir", "seed")


def extra_arguments(given: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the section, with the types that transformers declares.

    Args:
        given: The section.
        fields: Fields of the section ``training``, by name.

    Raises:
        ConfigError: A name is unknown, or a setting of falign; or a value has another type.
    """
    from pydantic import TypeAdapter, ValidationError
    from transformers import TrainingArguments

    for name in given:
        _require_extra(name, fields)
    types, read = get_type_hints(TrainingArguments), {}
    for name, value in given.items():
        try:
            read[name] = TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            reasons = " or ".join(dict.fromkeys(each["msg"] for each in error.errors(include_url=False)))
            raise ConfigError(f"{PLACE}.{name}={shown(value)}: {reasons}.") from error
    return read


def _require_extra(name: str, fields: Mapping[str, Any]) -> None:
    if name in EXTRA:
        return
    if name in fields or name in OF_THE_RUN:
        path = f"training.{name}" if name in fields else name
        raise ConfigError(f"{PLACE}.{name}: it is a field of the run file, {path}: set it there.")
    if name in FOREIGN_NAMES:
        raise ConfigError(f"{PLACE}.{name}: {FOREIGN_NAMES[name].message()}")
    close = nearest(name, [*EXTRA, *fields])
    place = "training" if close in fields else PLACE
    hint = f"did you mean {place}.{close}? It" if close else "it"
    raise ConfigError(f"{PLACE}.{name} is unknown: {hint} takes {', '.join(EXTRA)}.")


def check_effects(training: TrainingConfig, args: TrainingArguments) -> None:
    """Refuse extra arguments that would change nothing beside the other settings.

    Args:
        training: The section.
        args: The arguments made from it.

    Raises:
        ConfigError: One has no effect; the message has the reason.
    """
    for name in training.extra:
        if name in _REASONS and (reason := _REASONS[name](training, args)) is not None:
            raise ConfigError(f"{PLACE}.{name}={shown(training.extra[name])} has no effect: {reason}.")


def _without_trackers(training: TrainingConfig, args: TrainingArguments) -> str | None:
    return None if training.report_to else "it names the run in trackers, and training.report_to is empty"


def _without_trackio(training: TrainingConfig, args: TrainingArguments) -> str | None:
    return None if "trackio" in training.report_to else "it is for trackio, which is not in training.report_to"


def _without_evaluation(training: TrainingConfig, args: TrainingArguments) -> str | None:
    return None if training.eval_steps else "it delays evaluations during training, which training.eval_steps asks for"


def _in_one_process(training: TrainingConfig, args: TrainingArguments) -> str | None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return None
    return "it is of several processes (falign train RUN.yaml --launch ddp), and this is a single one"


def _without_tf32(training: TrainingConfig, args: TrainingArguments) -> str | None:
    from transformers.utils.import_utils import is_torch_tf32_available

    return None if is_torch_tf32_available() else "TF32 needs a GPU that has it, and there is none here"


def _unknown_level(training: TrainingConfig, args: TrainingArguments) -> str | None:
    from transformers.training_args import trainer_log_levels

    require_choice(f"{PLACE}.log_level", args.log_level, trainer_log_levels)
    return None


def _order(training: TrainingConfig, args: TrainingArguments) -> str | None:
    require_choice(f"{PLACE}.train_sampling_strategy", args.train_sampling_strategy, ("random", "sequential"))
    return "training.tokens_per_batch decides the order" if training.tokens_per_batch else None


def _unread(name: str) -> Callable[[TrainingConfig, TrainingArguments], str | None]:
    """Return the check that the optimizer reads a number, which another value must change."""

    def check(training: TrainingConfig, args: TrainingArguments) -> str | None:
        if _options(args) != _options(args, **{name: getattr(args, name) / 2}):
            return None
        return f"training.optim={training.optim} does not read it"

    return check


def _unread_options(training: TrainingConfig, args: TrainingArguments) -> str | None:
    pairs = str(args.optim_args).replace(" ", "").split(",")
    if not all(pair.count("=") == 1 for pair in pairs):
        raise ConfigError(f"{PLACE}.optim_args={shown(args.optim_args)}: write it as name=value,name=value.")
    for pair in pairs:
        name = pair.partition("=")[0]
        if not _reads_option(args, name):
            return f"training.optim={training.optim} does not read {name!r}"
    return None


def _reads_option(args: TrainingArguments, name: str) -> bool:
    """Return whether an optimizer reads an option; an impossible value then fails or changes what it is made with."""
    try:
        return _options(args, optim_args=f"{name}=?") != _options(args, optim_args=None)
    except (AttributeError, KeyError, TypeError, ValueError):
        return True


def _options(args: TrainingArguments, **changed: Any) -> tuple[Any, Any]:
    from transformers import Trainer

    other = copy.copy(args)
    for name, value in changed.items():
        setattr(other, name, value)
    return Trainer.get_optimizer_cls_and_kwargs(other)


_REASONS: dict[str, Callable[[TrainingConfig, TrainingArguments], str | None]] = {
    "adam_beta1": _unread("adam_beta1"),
    "adam_epsilon": _unread("adam_epsilon"),
    "ddp_bucket_cap_mb": _in_one_process,
    "eval_delay": _without_evaluation,
    "log_level": _unknown_level,
    "optim_args": _unread_options,
    "project": _without_trackio,
    "run_name": _without_trackers,
    "tf32": _without_tf32,
    "train_sampling_strategy": _order,
    "trackio_bucket_id": _without_trackio,
    "trackio_space_id": _without_trackio,
    "trackio_static_space_id": _without_trackio,
}
"""Returns why an argument would change nothing beside the other settings; None if it changes something."""
