"""What is drawn over the steps of training: training as lines, held-out values as marks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from falign.report.drawing import DASHED, SOLID, Line, Plot, Series, file_name
from falign.report.metric_names import Number, divergence_label
from falign.report.runs import ReportedRun

__all__ = ["curve_plots"]

SMOOTHED_FROM = 60
"""Points from which on a running mean is drawn over them."""
WINDOW = 20
"""Of the running mean: one part in so many of all points."""


class Panel(NamedTuple):
    """Metrics that share a plot.

    Attributes:
        name: Of the PNG file.
        title: What they are.
        unit: Of the second axis.
        solid: Metric whose line is solid.
        dashed: Metric whose line is dashed, and what the two are called.
        shares: Values lie between 0 and 1.
    """

    name: str
    title: str
    unit: str
    solid: str
    dashed: str | None = None
    called: tuple[str, str] = ("", "")
    shares: bool = False


PANELS = (
    Panel("loss", "Loss", "", "loss"),
    Panel("reward", "Reward", "", "reward"),
    Panel("pass-at-k", "Prompts solved", "", "pass@1", "pass@8", ("pass@1", "pass@8"), shares=True),
    Panel("reward-accuracy", "Reward accuracy", "", "rewards/accuracies", shares=True),
    Panel("implicit-reward", "Implicit reward", "nats", "rewards/chosen", "rewards/rejected", ("chosen", "rejected")),
    Panel("margin", "Margin of implicit rewards", "nats", "rewards/margins"),
    Panel(
        "log-ratio", "Log-ratio log π/π_ref", "nats", "logratios/chosen", "logratios/rejected", ("chosen", "rejected")
    ),
    Panel("log-ratio-samples", "Log-ratio of own samples", "nats", "logratios/policy"),
    Panel("nll", "Negative log-likelihood", "nats per token", "nll"),
    Panel("entropy", "Entropy", "nats per token", "entropy"),
    Panel("length", "Length of completions", "tokens", "completions/length"),
    Panel(
        "distinct",
        "Different n-grams within a group",
        "",
        "distinct-2",
        "distinct-1",
        ("2-grams", "1-grams"),
        shares=True,
    ),
    Panel("clipped", "Completions without an end", "", "completions/clipped", shares=True),
    Panel("grad-norm", "Gradient norm", "", "grad_norm"),
    Panel("learning-rate", "Learning rate", "", "learning_rate"),
)


def curve_plots(runs: Sequence[ReportedRun]) -> list[Plot]:
    """Return a plot for each panel that any run has values for; divergences have one each."""
    panels = [*PANELS[:8], *_divergences(runs), *PANELS[8:]]
    return [plot for panel in panels if (plot := _plot(panel, runs)) is not None]


def _divergences(runs: Sequence[ReportedRun]) -> Iterator[Panel]:
    logged = {name.removeprefix("eval_") for run in runs for log in run.logs for name in log}
    for metric in sorted(name for name in logged if name.startswith("divergence/")):
        name = metric.removeprefix("divergence/")
        yield Panel(f"divergence-{file_name(name)}", f"Divergence: {divergence_label(name)}", "nats", metric)


def _plot(panel: Panel, runs: Sequence[ReportedRun]) -> Plot | None:
    series: list[Series] = []
    for run in runs:
        for metric, line, called in zip((panel.solid, panel.dashed), (SOLID, DASHED), panel.called, strict=True):
            if metric is not None:
                label = ", ".join(part for part in (run.label if len(runs) > 1 else "", called) if part)
                series += _series(run, metric, line, label)
    if not any(len(set(each.x)) > 1 for each in series):  # a single step is no curve
        return None
    smooth = any(each.faint for each in series)
    held_out = any(each.marker for each in series)
    lines = f"solid: {panel.called[0]}, dashed: {panel.called[1]}" if panel.dashed else ""
    notes = (lines, "marks: held out" if held_out else "", "pale: before smoothing" if smooth else "")
    return Plot(
        panel.name,
        panel.title,
        "optimiser step",
        panel.unit,
        tuple(series),
        caption="; ".join(note for note in notes if note),
        whole=True,
        unit=panel.shares,
    )


def _series(run: ReportedRun, metric: str, line: Line, label: str) -> Iterator[Series]:
    color = run.color.light
    steps, values = _points(run, metric)
    if len(steps) >= SMOOTHED_FROM:
        yield Series("", steps, values, color, faint=True)
        values = _running_mean(values)
    if steps:
        yield Series(label or "training", steps, values, color, line=line)
    held_out, values = _points(run, f"eval_{metric}")
    if held_out:
        told = f"{label}, held out" if label else "held out"
        yield Series(told, held_out, values, color, line=None if steps else SOLID, marker=run.marker)


def _points(run: ReportedRun, metric: str) -> tuple[list[Number], list[Number]]:
    points = [(log["step"], log[metric]) for log in run.logs if metric in log]
    return [step for step, _ in points], [value for _, value in points]


def _running_mean(values: Sequence[Number]) -> list[Number]:
    half = max(1, len(values) // WINDOW // 2)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
