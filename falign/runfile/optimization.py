"""The check that an optimizer and a learning-rate schedule of transformers work, before a model is loaded."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from falign.choices import require_choice
from falign.errors import ConfigError

__all__ = ["check_names", "check_optimizer", "check_schedule", "same_learning_rates"]


_BY_MODULES = "it trains only chosen modules, which a run file cannot name"
_BY_METRIC = "it follows a metric instead of the steps, and gets no metric here"
_OWN_BACKWARD = "it updates weights within the backward pass, before the loss and gradient of the step are checked"
_TWO_WEIGHTS = "it trains other weights than it evaluates, and checkpoints would hold the trained ones"

REFUSED_OPTIMIZERS = {
    "galore": _BY_MODULES,
    "apollo": _BY_MODULES,
    "lomo": _OWN_BACKWARD,
    "adalomo": _OWN_BACKWARD,
    "schedule_free": _TWO_WEIGHTS,
}
"""Reasons by the beginning of the optimizer's name."""

REFUSED_SCHEDULES = {"reduce_lr_on_plateau": _BY_METRIC, "greedy": _BY_METRIC}
WITHOUT_OPTIONS = ("constant", "constant_with_warmup", "linear")
"""Schedules without options; transformers would ignore options of the first two in silence."""

TRIAL_SHAPE = (64, 128)  # large enough: 8-bit optimizers keep tensors of fewer than 4,096 values in 32 bits
TRIAL_LEARNING_RATE = 1e-2  # the run's rate may be below the rounding of the trial weight
MANY_STEPS = 1_000_000  # stands in for a number of steps that follows from epochs, known only when data are read


def check_names(optimizer: str, schedule: str) -> None:
    """Refuse settings that transformers does not have or that cannot work in a run.

    Args:
        optimizer: ``training.optim``.
        schedule: ``training.lr_scheduler_type``.

    Raises:
        ConfigError: A setting is unknown or cannot work; the message has the nearest name or the reason.
    """
    require_choice("training.optim", optimizer, [each.value for each in OptimizerNames])
    require_choice("training.lr_scheduler_type", schedule, [each.value for each in SchedulerType])
    for beginning, reason in REFUSED_OPTIMIZERS.items():
        if optimizer.startswith(beginning):
            raise ConfigError(
                f"training.optim={optimizer!r} is not supported: {reason}; choose another, such as adamw_torch."
            )
    if schedule in REFUSED_SCHEDULES:
        raise ConfigError(f"training.lr_scheduler_type={schedule!r} is not supported: {REFUSED_SCHEDULES[schedule]}.")


def check_optimizer(args: TrainingArguments) -> None:
    """Refuse an optimizer that cannot be made, take a step or save its state here.

    Args:
        args: Training arguments, with ``optim`` and its settings.

    Raises:
        ConfigError: The optimizer does not work; the message has the reason.
    """
    name = OptimizerNames(args.optim).value
    try:
        weight = nn.Parameter(torch.ones(TRIAL_SHAPE, device=args.device))
        factory, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = factory([weight], **options | {"lr": TRIAL_LEARNING_RATE})
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        saved.seek(0)
        optimizer.load_state_dict(torch.load(saved, weights_only=True))
        learned = bool((weight < 1).all() and weight.isfinite().all())
    except Exception as error:
        raise ConfigError(f"training.optim={name!r} does not work here: {type(error).__name__}: {error}") from error
    if not learned:
        raise ConfigError(f"training.optim={name!r} does not work here: its step does not follow the gradient.")


def check_schedule(args: TrainingArguments) -> None:
    """Refuse a learning-rate schedule that cannot be made or gives invalid learning rates.

    Args:
        args: Training arguments, with ``lr_scheduler_type`` and ``lr_scheduler_kwargs``.

    Raises:
        ConfigError: The schedule does not work; the message has the reason.
    """
    name = SchedulerType(args.lr_scheduler_type).value
    options: Any = args.lr_scheduler_kwargs or {}
    if name in WITHOUT_OPTIONS and options:
        raise ConfigError(
            f"training.lr_scheduler_kwargs={options!r}: the schedule {name} has no options; leave it out."
        )
    place = f"training.lr_scheduler_type={name!r} with training.lr_scheduler_kwargs={options!r}"
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    steps = args.max_steps if args.max_steps > 0 else MANY_STEPS
    taken = [min(steps * part // 10, steps - 1) for part in range(11)]
    warmup = args.get_warmup_steps(steps)

    def at(num_warmup_steps: int) -> list[float]:
        schedule: Any = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=num_warmup_steps,
            num_training_steps=steps,
            scheduler_specific_kwargs=options,
        )
        (factor,) = schedule.lr_lambdas
        return [float(factor(step)) for step in taken]

    try:
        factors = at(warmup)
        without = at(0) if warmup and not any(factors) else []
    except Exception as error:
        raise ConfigError(f"{place} does not work: {type(error).__name__}: {error}") from error
    if any(without):
        raise ConfigError(
            f"training.warmup_steps={args.warmup_steps:g} is a warm-up of {warmup} steps, which begins at a learning "
            f"rate of 0, and training.max_steps={steps}: the learning rate would be 0 throughout. Set "
            "training.warmup_steps=0, or raise training.max_steps."
        )
    if not all(math.isfinite(each) and each >= 0 for each in factors) or not any(factors):
        raise ConfigError(f"{place}: the learning rate would be negative, NaN, infinite or always 0 (times {factors}).")


def same_learning_rates(args: TrainingArguments, steps: int, other_steps: int, *, until: int) -> bool:
    """Return whether two lengths of a run give the same learning rates up to a step.

    Args:
        args: Arguments with the schedule.
        steps: Steps of the run.
        other_steps: Steps of the same run, made longer or shorter.
        until: The last step that is compared.
    """
    factor, other = _factor(args, steps), _factor(args, other_steps)
    return all(factor(step) == other(step) for step in range(until + 1))


def _factor(args: TrainingArguments, steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at each step."""
    options: Any = args.lr_scheduler_kwargs
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=options,
    )
    if not isinstance(scheduler, LambdaLR):  # it follows a metric, whatever the number of steps
        return lambda step: 1.0
    return scheduler.lr_lambdas[0]
