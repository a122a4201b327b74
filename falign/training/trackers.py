"""Experiment trackers that receive a run's metrics: ``training.report_to``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
)
from typing_extensions import override

__all__ = ["prepare_trackers"]


def prepare_trackers(trainer: Trainer, folder: Path, *, evaluates: bool) -> None:
    """Let trackers have all that ``metrics.jsonl`` has, and let TensorBoard's files lie in the run folder.

    Args:
        trainer: Not yet trained or evaluated.
        folder: Of the run.
        evaluates: Whether there is held-out data.
    """
    trackers = [each for each in trainer.callback_handler.callbacks if type(each) in INTEGRATION_TO_CALLBACK.values()]
    for tracker in trackers:
        # It learns its folder when training begins, and would write the evaluation before that elsewhere.
        if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:
            tracker.logging_dir = str(folder / "tensorboard")
    if trackers and evaluates:
        trainer.add_callback(_LastEvaluation())


class _LastEvaluation(TrainerCallback):
    """Evaluate the last step within training: trackers close when it ends, and would miss what comes after."""

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
