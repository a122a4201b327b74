"""Completions of a run as a table in each of its trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)
from typing_extensions import override

__all__ = ["TrackerTables"]


def _wandb(tracker: Any, name: str, frame: pd.DataFrame, step: int) -> None:
    wandb = tracker._wandb
    wandb.log({name: wandb.Table(dataframe=frame), "train/global_step": step})


def _trackio(tracker: Any, name: str, frame: pd.DataFrame, step: int) -> None:
    trackio = tracker._trackio
    trackio.log({name: trackio.Table(dataframe=frame), "train/global_step": step})


def _mlflow(tracker: Any, name: str, frame: pd.DataFrame, step: int) -> None:
    tracker._ml_flow.log_table(frame, artifact_file=f"{name}/step-{step:06d}.json")


def _tensorboard(tracker: Any, name: str, frame: pd.DataFrame, step: int) -> None:
    writer = tracker.tb_writer
    writer.add_text(name, _markdown(frame), step)
    writer.flush()


# Names as in `training.report_to`: falign.runfile.training_config.TABLES lists them.
WRITERS: Mapping[type[TrainerCallback], Callable[[Any, str, pd.DataFrame, int], None]] = {
    WandbCallback: _wandb,
    TrackioCallback: _trackio,
    MLflowCallback: _mlflow,
    TensorBoardCallback: _tensorboard,
}


class TrackerTables(TrainerCallback):
    """Write the completions of the last rollout, and of the last evaluation, to the trackers at each log.

    The tables are named ``completions`` and ``eval/completions``; the columns are those of ``completions.jsonl``, with
    one for each reward.

    Args:
        trackers: The run's trackers; those without tables are left out.
    """

    def __init__(self, trackers: Sequence[TrainerCallback]) -> None:
        self.trackers = [tracker for tracker in trackers if type(tracker) in WRITERS]
        self._rows: dict[str, list[dict[str, Any]]] = {}

    def add(self, rows: list[dict[str, Any]], held_out: bool) -> None:
        """Keep completions until the next log; those of an earlier rollout are replaced."""
        self._rows["eval/completions" if held_out else "completions"] = rows

    @override
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Trackers come first among the callbacks, so each has started by now.
        for name, rows in self._rows.items():
            frame = pd.DataFrame([_cells(row) for row in rows])
            for tracker in self.trackers:
                WRITERS[type(tracker)](tracker, name, frame, state.global_step)
        self._rows.clear()


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with a column for each reward, and conversations as text."""
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    cells = {name: value for name, value in row.items() if name not in ("parts", "held_out")}
    return {**cells, "prompt": text, **{f"reward/{name}": value for name, value in row["parts"].items()}}


def _markdown(frame: pd.DataFrame) -> str:
    """Return a table in Markdown, which TensorBoard draws."""
    lines = [frame.columns.tolist(), ["---"] * frame.shape[1], *frame.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return "<br>".join(text.splitlines()).replace("|", "\\|")
