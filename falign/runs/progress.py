"""Progress of a run on the terminal, and its metrics on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from falign.durable import append
from falign.runs.folder import log_line
from falign.terminal import BAR

__all__ = ["MetricsFile", "ProgressBar"]

FAILURES = {
    f"{prefix}reward/{name}": f"{told}reward {name}"
    for prefix, told in (("", ""), ("eval_", "held-out "))
    for name in ("errors", "timeouts")
}
"""Counts of calls of rewards that failed, which are shown where there are any."""

SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "acc",
    "rewards/margins": "margin",
    "eval_rewards/accuracies": "held-out acc",
    "reward": "reward",
    "eval_reward": "held-out reward",
    "completions/length": "tokens",
    **FAILURES,
}


class MetricsFile(TrainerCallback):
    """Append every log to ``metrics.jsonl``, one object a line with its step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            append(self.path, log_line({"step": state.global_step, **(logs or {})}))


class ProgressBar(TrainerCallback):
    """A bar with the latest loss, accuracy and margin beside it; on what is no terminal, a line per log."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            *BAR, TextColumn("{task.fields[metrics]}"), console=console, disable=not console.is_terminal
        )
        self.task: TaskID | None = None
        self.latest: dict[str, float] = {}

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, metrics="")
            self.progress.start()

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        new = {SHOWN[name]: value for name, value in (logs or {}).items() if name in SHOWN}
        self.latest.update(new)
        told = {name: value for name, value in self.latest.items() if value or name not in FAILURES.values()}
        shown = "  ".join(f"{name} {value:.3g}" for name, value in told.items())
        if self.task is not None:
            self.progress.update(self.task, metrics=shown)
        if state.is_world_process_zero and not self.console.is_terminal and new:
            # The trainer counts the steps when training begins.
            place = f"step {state.global_step}/{state.max_steps}" if state.max_steps else "before training"
            self.console.print(f"{place}  {shown}", highlight=False, soft_wrap=True)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also when the run fails."""
        self.progress.stop()
