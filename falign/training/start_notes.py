"""Notes at the start of a run: its learning rate, if that is the default, and how much work a crash would cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from falign.runfile.config import RunConfig

__all__ = ["CheckpointAdvice", "start_notes"]

HOUR = 3600.0
"""Seconds of work that a crash may cost before a note says so."""

MEASURED = 3
"""Steps whose mean time counts, behind the first one, which is slower."""


def start_notes(config: RunConfig, steps: int) -> Iterator[str]:
    """Yield what the user should know before the first step.

    Args:
        config: The run.
        steps: Its number of optimizer steps.
    """
    training = config.training
    if "learning_rate" not in training.model_fields_set:
        what = "an adapter" if config.adapter is not None else "all weights"
        yield f"learning rate {training.learning_rate:g}, the default for {what} (training.learning_rate)"
    every = training.save_steps
    if every is None or every >= steps:
        field = "training.save_steps is not set" if every is None else f"training.save_steps={every} of {steps} steps"
        minutes = training.save_minutes
        when = "no checkpoints before the end" if minutes is None else f"a checkpoint every {minutes:g} minutes only"
        lost = "all steps" if minutes is None else "the steps since the last one"
        yield (
            f"{when} ({field}): a crash loses {lost}. Ctrl-C writes a checkpoint; "
            "training.save_steps=N writes one every N steps"
        )


class CheckpointAdvice(TrainerCallback):
    """Say once, as soon as the time of a step is known, if checkpoints are further apart than an hour.

    Args:
        save_steps: Steps between checkpoints; None if there are none.
        tell: Called with the message.
        clock: Returns seconds.
    """

    def __init__(
        self, save_steps: int | None, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._save_steps, self._tell, self._clock = save_steps, tell, clock
        self._first: int | None = None
        self._began = 0.0

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._first is None:
            self._first, self._began = state.global_step, self._clock()
            return
        if state.global_step != self._first + MEASURED:
            return
        seconds = (self._clock() - self._began) / MEASURED
        between = min(self._save_steps or state.max_steps, state.max_steps)
        if between * seconds <= HOUR:
            return
        advised = max(1, int(HOUR / seconds))
        self._tell(
            f"a step takes {seconds:.3g} s, so that {between} steps without a checkpoint take "
            f"{between * seconds / HOUR:.1f} hours: training.save_steps={advised} writes one an hour. "
            "Stop the run with Ctrl-C, set the field, and continue with --resume."
        )
