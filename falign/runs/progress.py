"""Progress of a run: a bar on the terminal, metrics on disk, and a plot of its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from falign.durable import append, writing
from falign.runs.folder import log_line
from falign.terminal import BAR

__all__ = ["MetricsFile", "ProgressBar", "plot_curves"]


FAILURES = {
    f"{prefix}reward/{name}": f"{label}reward {name}"
    for prefix, label in (("", ""), ("eval_", "held-out "))
    for name in ("errors", "timeouts")
}
"""Counts of failed reward calls, shown only if there are any."""

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
    """Append every log to ``metrics.jsonl``, one object per line with its step."""

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
    """A bar with the latest loss, accuracy and margin beside it; without a terminal, one line per log."""

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
        new = {label: value for name, value in (logs or {}).items() if (label := _label(name))}
        self.latest.update(new)
        parts = {name: value for name, value in self.latest.items() if value or name not in FAILURES.values()}
        shown = "  ".join(f"{name} {value:.3g}" for name, value in parts.items())
        if self.task is not None:
            self.progress.update(self.task, metrics=shown)
        if state.is_world_process_zero and not self.console.is_terminal and new:
            # max_steps is 0 until training begins.
            place = f"step {state.global_step}/{state.max_steps}" if state.max_steps else "before training"
            self.console.print(f"{place}  {shown}", highlight=False, soft_wrap=True)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Restore the terminal, also if the run fails."""
        self.progress.stop()


def _label(metric: str) -> str:
    """Return the name under which a metric is shown, with that of its term of a sum; empty if it is not shown."""
    if metric in SHOWN:
        return SHOWN[metric]
    held_out = "eval_" if metric.startswith("eval_") else ""
    term, _, own = metric.removeprefix("eval_").partition("/")
    # The reward of a sum is logged once, without a term.
    label = SHOWN.get(f"{held_out}{own}", "") if own != "reward" else ""
    return f"{term} {label}" if label else ""


CHOSEN, REJECTED, PLAIN = "#0b7a75", "#c8553d", "#3d405b"
OFFLINE = {
    "loss": (("loss", PLAIN, ""),),
    "implicit reward": (("rewards/chosen", CHOSEN, "chosen"), ("rewards/rejected", REJECTED, "rejected")),
    "reward accuracy": (("rewards/accuracies", PLAIN, ""),),
    "log-ratio log π/π_ref (nats)": (
        ("logratios/chosen", CHOSEN, "chosen"),
        ("logratios/rejected", REJECTED, "rejected"),
    ),
}
ONLINE = {
    "reward": (("reward", PLAIN, ""),),
    "share of prompts solved": (("pass@1", REJECTED, "pass@1"), ("pass@8", CHOSEN, "pass@8")),
    "reverse KL to the reference (nats)": (("divergence/reverse_kl", PLAIN, ""),),
    "entropy per token (nats)": (("entropy", PLAIN, ""),),
    "length (tokens)": (("completions/length", PLAIN, ""),),
    "different bigrams within a group": (("distinct-2", PLAIN, ""),),
}


def _panels(logs: Sequence[Mapping[str, Any]]) -> Mapping[str, tuple[tuple[str, str, str], ...]]:
    """Return the panels of a run: of online rewards, of preferences, or of a divergence to a teacher."""
    names = {name.removeprefix("eval_") for log in logs for name in log}
    if "reward" in names:
        return ONLINE
    distilled = sorted(name for name in names if "divergence/" in name or name.endswith("measure"))
    if not distilled or any(name.endswith("rewards/accuracies") for name in names):
        return OFFLINE
    online = {name: ONLINE[name] for name in ("length (tokens)", "different bigrams within a group")}
    return {
        "loss": (("loss", PLAIN, ""),),
        "divergence (nats per completion)": ((distilled[0], PLAIN, distilled[0]),),
        "entropy per token (nats)": (("entropy", PLAIN, ""),),
        "negative log-likelihood (nats per token)": (("nll", PLAIN, ""),),
        **(online if "completions/length" in names else {}),
    }


def plot_curves(logs: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Plot training metrics as lines and held-out values as dots.

    Args:
        logs: The lines of ``metrics.jsonl``.
        path: The PNG to write.
        title: Title of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    panels = _panels(logs)
    columns = len(panels) // 2
    figure, axes = plt.subplots(2, columns, figsize=(5 * columns, 6.4), layout="constrained", sharex=True)
    for axis, (label, series) in zip(axes.flat, panels.items(), strict=True):
        for name, color, legend in series:
            for key, style in ((name, {"linewidth": 1.8}), (f"eval_{name}", {"linestyle": "", "marker": "o"})):
                points = [(log["step"], log[key]) for log in logs if key in log]
                text = " ".join(part for part in (legend, "held out" if key != name else "training") if part)
                if points:
                    axis.plot(*zip(*points, strict=True), color=color, label=text, **style)
        axis.set_title(label, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    figure.suptitle(title, fontsize=11)
    with writing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    plt.close(figure)
