"""Where the metrics of a run are shown besides its folder: ``training.report_to``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)
from typing_extensions import override

from falign.errors import ConfigError

__all__ = ["check_trackers", "prepare_trackers"]

NONE, ALL = "none", "all"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that cannot be reached, before anything is loaded.

    Raises:
        ConfigError: One is unknown, or its package is not installed.
    """
    known = {NONE, ALL, *INTEGRATION_TO_CALLBACK}
    if unknown := sorted(set(names) - known):
        raise ConfigError(f"training.report_to={unknown[0]!r} is unknown: choose of {', '.join(sorted(known))}.")
    if len(names) > 1 and (alone := {NONE, ALL} & set(names)):
        raise ConfigError(f"training.report_to={list(names)}: {min(alone)} stands alone; leave out the others.")
    for name in sorted(set(names) - {NONE, ALL} - set(get_available_reporting_integrations())):
        package = name.replace("_", "-")
        raise ConfigError(
            f"training.report_to={name!r}: the package {package} is not installed. Install it (pip install {package}), "
            "or leave it out."
        )


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
