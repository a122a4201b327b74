"""The course of a run: callbacks of the user's own, early stopping, the best model, and checkpoints by time."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState
from typing_extensions import override

from falign.choices import nearest
from falign.errors import ConfigError, MemberError, TrainingError
from falign.raised import calling
from falign.runfile.course_config import EarlyStoppingConfig, KeepBestConfig
from falign.runfile.training_config import TrainingConfig
from falign.training.processes import highest, is_writer

__all__ = ["Callbacks", "Course", "EarlyStopping", "KeepBest", "SaveByTime"]

ROOM = 2
"""Free disk that a checkpoint by time needs, in multiples of its size: it must leave place for the trained model."""


class Callbacks(CallbackHandler):
    """The callbacks of a trainer; an exception in a user's own is raised with its event and lines."""

    @classmethod
    def of(cls, handler: CallbackHandler) -> Callbacks:
        """Return the callbacks of another handler."""
        return cls(handler.callbacks, handler.model, handler.processing_class, handler.optimizer, handler.lr_scheduler)

    @override
    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        with calling(f"{event} of", self):
            return super().call_event(event, args, state, control, **kwargs)


class Comparison:
    """Compare values of a held-out metric, from evaluations during training.

    Args:
        section: The metric and its direction.
        place: The section's path, for messages.
    """

    def __init__(self, section: KeepBestConfig, place: str) -> None:
        self.metric, self.rises, self.place = section.metric, section.rises, place

    def require(self, metrics: Mapping[str, float], where: str) -> None:
        """Refuse a metric that an evaluation does not have.

        Args:
            metrics: Of an evaluation, without prefix.
            where: The evaluation, for messages.

        Raises:
            ConfigError: It does not have it; the message names those that it has.
        """
        if self.metric not in metrics:
            close = nearest(self.metric, metrics)
            hint = f"; did you mean {close!r}?" if close else ":"
            raise ConfigError(
                f"{self.place}.metric={self.metric!r} is not among the held-out metrics of {where}{hint} They are "
                f"{', '.join(sorted(metrics))}."
            )

    def value(self, metrics: Mapping[str, float], step: int) -> float:
        """Return the metric's value in an evaluation, whose metrics have the prefix ``eval_``."""
        self.require({name.removeprefix("eval_"): value for name, value in metrics.items()}, f"step {step}")
        return metrics[f"eval_{self.metric}"]

    def is_better(self, value: float, than: float | None, *, by: float = 0.0) -> bool:
        """Return whether a value is better than the best so far; NaN never is."""
        if math.isnan(value):
            return False
        return than is None or (value - than if self.rises else than - value) > by


class EarlyStopping(TrainerCallback, ExportableState):
    """End training after a number of evaluations in a row without improvement.

    Args:
        section: The metric, the number, and the smallest improvement.
        tell: Called with a message when training ends.
    """

    def __init__(self, section: EarlyStoppingConfig, tell: Callable[[str], None]) -> None:
        self.patience, self.min_delta, self.tell = section.patience, section.min_delta, tell
        self.compare = Comparison(section, "training.early_stopping")
        self.best: float | None = None
        self.waited = 0

    @override
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.global_step:  # of the untrained model
            return
        value = self.compare.value(metrics or {}, state.global_step)
        if self.compare.is_better(value, self.best, by=self.min_delta):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience and not control.should_training_stop:
            control.should_training_stop = True
            said = "none" if self.best is None else f"{self.best:.4g}"
            self.tell(
                f"early stopping at step {state.global_step}: {self.compare.metric} was not better than {said} in the "
                f"last {self.waited} evaluations."
            )

    @override
    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"best": self.best, "waited": self.waited}}


class KeepBest(TrainerCallback, ExportableState):
    """Write a checkpoint whenever a held-out metric is better than in all earlier evaluations of the training.

    Args:
        section: The metric.
    """

    def __init__(self, section: KeepBestConfig) -> None:
        self.compare = Comparison(section, "training.keep_best")
        self.step: int | None = None
        self.best: float | None = None

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps or control.should_training_stop:
            control.should_evaluate = True  # the last model may be the best

    @override
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.global_step:
            return
        value = self.compare.value(metrics or {}, state.global_step)
        if self.compare.is_better(value, self.best):
            self.step, self.best, control.should_save = state.global_step, value, True

    @override
    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"step": self.step, "best": self.best}}


class SaveByTime(TrainerCallback):
    """Write a checkpoint if none was written for some time and the disk has room for it.

    Args:
        minutes: The time.
        tell: Called with a message when the disk has no room.
        clock: Returns seconds.
    """

    def __init__(
        self, minutes: float, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.minutes, self.tell, self.clock = minutes, tell, clock
        self.last = 0.0  # until training begins
        self._told = False

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last = self.clock()

    @override
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        due = is_writer() and self.clock() - self.last >= 60 * self.minutes
        if due and not control.should_save and not self._has_room(str(args.output_dir), _size(model, optimizer)):
            due, self.last = False, self.clock()
        if highest(int(due)):  # all processes must save after the same step
            control.should_save = True

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last = self.clock()

    def _has_room(self, folder: str, size: int) -> bool:
        free = shutil.disk_usage(folder).free
        if free < ROOM * size and not self._told:
            self._told = True
            self.tell(
                f"no checkpoint after {self.minutes:g} minutes (training.save_minutes): it would take "
                f"{size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free in {folder}. Free some, or a killed run "
                "begins again from its last checkpoint."
            )
        return free >= ROOM * size


def _size(model: torch.nn.Module, optimizer: Any) -> int:
    """Return the bytes of a checkpoint: trained weights, the optimizer's copies of them, and its state."""
    trained = [each for each in model.parameters() if each.requires_grad]
    stepped = [each for group in optimizer.param_groups for each in group["params"]]
    states = [each for state in optimizer.state.values() for each in state.values() if isinstance(each, torch.Tensor)]
    written = {id(each): each for each in [*trained, *stepped, *states]}
    return sum(each.numel() * each.element_size() for each in written.values())


@dataclass(frozen=True)
class Course:
    """The rules that steer a run besides its number of steps.

    Attributes:
        callbacks: In the order in which they are called; their states are in checkpoints.
        best: The one that keeps the best model; None if the last one is kept.
        comparisons: The metrics that evaluations must have.
    """

    callbacks: tuple[TrainerCallback, ...] = ()
    best: KeepBest | None = None
    comparisons: tuple[Comparison, ...] = field(default=())

    @classmethod
    def of(cls, training: TrainingConfig, tell: Callable[[str], None]) -> Course:
        """Return the course that the section ``training`` describes.

        Args:
            training: The section.
            tell: Called with messages for the user.

        Raises:
            ConfigError: A callback of the user's own cannot be made, or its state cannot be saved.
        """
        own = [each.build(f"training.callbacks.{i}") for i, each in enumerate(training.callbacks)]
        stopping = None if training.early_stopping is None else EarlyStopping(training.early_stopping, tell)
        best = None if training.keep_best is None else KeepBest(training.keep_best)
        by_time = None if training.save_minutes is None else SaveByTime(training.save_minutes, tell)
        callbacks = tuple(each for each in (*own, stopping, best, by_time) if each is not None)
        made = cls(callbacks, best, tuple(each.compare for each in (stopping, best) if each is not None))
        made.state_dict()  # refuses a state that cannot be saved, before anything is loaded
        return made

    def require_metrics(self, metrics: Mapping[str, float]) -> None:
        """Refuse metrics that the evaluation before the first step does not have.

        Raises:
            ConfigError: It does not have one; the message names those that it has.
        """
        for each in self.comparisons:
            each.require(metrics, "the evaluation before training")

    def state_dict(self) -> list[Any]:
        """Return the state of each callback that has one, as plain values.

        Raises:
            ConfigError: A callback's state cannot be saved.
        """
        return [_state(each) for each in self._stateful]

    def load_state_dict(self, states: Sequence[Any]) -> None:
        """Restore the states of callbacks.

        Raises:
            TrainingError: They are of other callbacks.
        """
        if len(states) != len(self._stateful):
            raise TrainingError(f"the checkpoint has states of {len(states)} callbacks, not of {len(self._stateful)}")
        for callback, state in zip(self._stateful, states, strict=True):
            for name, value in state.get("attributes", {}).items():
                setattr(callback, name, value)

    @property
    def _stateful(self) -> list[Any]:
        return [each for each in self.callbacks if isinstance(each, ExportableState)]


def _state(callback: ExportableState) -> Mapping[str, Any]:
    """Return a callback's state, which must be what a checkpoint gives back."""
    try:
        with calling("callback", callback):
            state: Any = callback.state()
    except MemberError as error:
        raise ConfigError(f"training.callbacks: {error}") from error.__cause__
    try:
        kept = json.loads(json.dumps(state))
    except (TypeError, ValueError) as error:
        kept, reason = None, str(error)
    else:
        reason = f"a checkpoint would give back {kept!r}"
    # As texts, because NaN differs from itself.
    if not isinstance(state, Mapping) or (kept != state and repr(kept) != repr(state)):
        raise ConfigError(
            f"training.callbacks: the state of {type(callback).__name__} is {state!r} ({reason}): return a dict of "
            "plain values, {'args': {...}, 'attributes': {...}}."
        )
    return state
