"""Callbacks of a run: stopping by a signal at the end of a step, and experiment trackers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
)
from typing_extensions import override

from falign.training.processes import highest, num_processes

__all__ = ["StopAtStepEnd", "prepare_trackers"]


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopAtStepEnd(TrainerCallback):
    """Stop training after the step in which a signal arrives; a second signal ends the process at once.

    Several processes stop after the same step, even if only one of them got the signal, and then ignore a second one:
    a launcher passes on the signal, which its processes may already have, and kills those that do not end in time.

    Args:
        tell: Called with a message when the run is about to stop.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.caught: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch signals while the block runs; only in the main thread, because Python allows it nowhere else."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self._catch) for each in SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        # A second signal gets Python's own handler, which ends a single process at once.
        self.caught, alone = signal.Signals(number), num_processes() == 1
        for each in SIGNALS:
            signal.signal(each, signal.default_int_handler if alone else signal.SIG_IGN)
        more = "; once more stops it at once" if alone else ""
        self.tell(f"{self.caught.name}: the run stops after this step, with a checkpoint{more}.")

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # All processes must stop after the same step, so they agree on the signal that any of them got.
        if number := highest(0 if self.caught is None else self.caught):
            self.caught = signal.Signals(number)
            control.should_save = True

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Not earlier: a checkpoint of a run that something else has ended says so, and does not train on when resumed.
        if self.caught is not None:
            control.should_training_stop = True


def prepare_trackers(trainer: Trainer, folder: Path, *, evaluates: bool) -> None:
    """Make trackers record the same logs as ``metrics.jsonl``, and put TensorBoard's files into the run folder.

    Args:
        trainer: The trainer, before its first step and evaluation.
        folder: The run folder.
        evaluates: Whether there is held-out data.
    """
    trackers = [each for each in trainer.callback_handler.callbacks if type(each) in INTEGRATION_TO_CALLBACK.values()]
    for tracker in trackers:
        # It sets its folder when training begins, too late for the evaluation before the first step.
        if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:
            tracker.logging_dir = str(folder / "tensorboard")
    if trackers and evaluates:
        trainer.add_callback(_LastEvaluation())


class _LastEvaluation(TrainerCallback):
    """Evaluate at the last step, before training ends: trackers close with it and would miss a later evaluation."""

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
