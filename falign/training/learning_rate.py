"""The learning rates of a run, as far as they follow from its number of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

__all__ = ["same_learning_rates"]


def same_learning_rates(args: TrainingArguments, steps: int, other_steps: int, *, until: int) -> bool:
    """Return whether a run has the same learning rates whether it has so many steps or so many.

    Args:
        args: Say the schedule.
        steps: Of the run.
        other_steps: Of the same run, made longer or shorter.
        until: The last step that counts.
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
    if not isinstance(scheduler, LambdaLR):  # it follows what is measured, whatever the number of steps
        return lambda step: 1.0
    return scheduler.lr_lambdas[0]
