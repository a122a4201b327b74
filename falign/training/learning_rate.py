"""The learning rates of a run, as far as they follow from its number of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

__all__ = ["same_learning_rates"]


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
