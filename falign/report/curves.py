"""Curves over the optimizer steps: training as lines, held-out values as marks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from falign.report.drawing import DASHED, SOLID, Line, Plot, Series, file_name
from falign.report.metric_names import Number, divergence_label
from falign.report.runs import ReportedRun

__all__ = ["curve_plots"]

SMOOTHED_FROM = 60
"""Number of points from which a curve gets a running mean."""

WINDOW = 20
"""The window of the running mean holds 1/WINDOW of all points."""

MOST_POINTS, MOST_MARKS = 1000, 200
"""Maximum number of parts of a curve; a longer curve is drawn by the extremes and means of its parts."""


class Panel(NamedTuple):
    """Metrics that share a plot.

    Attributes:
        name: Name of the PNG file.
        title: Title of the plot.
        unit: Unit of the vertical axis.
        solid: Metric of the solid line.
        dashed: Metric of the dashed line; None for none.
        called: Labels of both lines.
        shares: Whether values lie between 0 and 1.
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
    """Return the plots of all panels for which a run has values; each divergence has its own panel."""
    panels = [*PANELS[:8], *_divergences(runs), *PANELS[8:]]
    panels += [part for panel in panels for part in _of_terms(panel, runs)]
    return [plot for panel in panels if (plot := _plot(panel, runs)) is not None]


def _divergences(runs: Sequence[ReportedRun]) -> Iterator[Panel]:
    found = {name[name.index("divergence/") :] for name in _logged(runs) if re.fullmatch(r"(\w+/)?divergence/.*", name)}
    for metric in sorted(found):
        name = metric.removeprefix("divergence/")
        yield Panel(f"divergence-{file_name(name)}", f"Divergence: {divergence_label(name)}", "nats", metric)


def _logged(runs: Sequence[ReportedRun]) -> set[str]:
    return {name.removeprefix("eval_") for run in runs for log in run.logs for name in log}


def _of_terms(panel: Panel, runs: Sequence[ReportedRun]) -> Iterator[Panel]:
    """Return the panel of each term of a sum, or further reference, whose metric has its name before it."""
    ending = f"/{panel.solid}"
    for term in sorted(name.removesuffix(ending) for name in _logged(runs) if name.endswith(ending)):
        if "/" not in term and f"{term}{ending}" != panel.solid:
            dashed = None if panel.dashed is None else f"{term}/{panel.dashed}"
            named = {"name": f"{file_name(term)}-{panel.name}", "title": f"{term}: {panel.title}"}
            yield panel._replace(**named, solid=f"{term}{ending}", dashed=dashed)


def _plot(panel: Panel, runs: Sequence[ReportedRun]) -> Plot | None:
    series: list[Series] = []
    for run in runs:
        for metric, line, called in zip((panel.solid, panel.dashed), (SOLID, DASHED), panel.called, strict=True):
            if metric is not None:
                label = ", ".join(part for part in (run.label if len(runs) > 1 else "", called) if part)
                series += _series(run, metric, line, label)
    if not any(len(set(each.x)) > 1 for each in series):  # one step does not make a curve
        return None
    smooth = any(each.faint for each in series)
    held_out = any(each.marker for each in series)
    lines = f"solid: {panel.called[0]}, dashed: {panel.called[1]}" if panel.dashed else ""
    notes = (lines, "marks: held out" if held_out else "", "pale: before smoothing" if smooth else "")
    return Plot(
        panel.name,
        panel.title,
        "optimizer step",
        panel.unit,
        tuple(series),
        caption="; ".join(note for note in notes if note),
        whole=True,
        unit=panel.shares,
    )


def _series(run: ReportedRun, metric: str, line: Line, label: str) -> Iterator[Series]:
    color = run.color.light
    points = _points(run, metric)
    parts = _parts(points, MOST_POINTS)
    if len(points) >= SMOOTHED_FROM:
        yield _curve("", [point for part in parts for point in _extremes(part)], color, faint=True)
        points = _running_means(parts)
    if points:
        yield _curve(label or "training", points, color, line=line)
    held_out = [part[-1] for part in _parts(_points(run, f"eval_{metric}"), MOST_MARKS)]
    if held_out:
        name = f"{label}, held out" if label else "held out"
        yield _curve(name, held_out, color, line=None if points else SOLID, marker=run.marker)


Point: TypeAlias = tuple[Number, Number]
"""Step and value."""


def _curve(label: str, points: Sequence[Point], color: str, **look: Any) -> Series:
    return Series(label, [step for step, _ in points], [value for _, value in points], color, **look)


def _points(run: ReportedRun, metric: str) -> list[Point]:
    return [(log["step"], log[metric]) for log in run.logs if metric in log]


def _parts(points: Sequence[Point], most: int) -> list[Sequence[Point]]:
    """Split a curve into at most ``most`` parts of equal length."""
    size = max(1, -(-len(points) // most))
    return [points[start : start + size] for start in range(0, len(points), size)]


def _extremes(part: Sequence[Point]) -> Sequence[Point]:
    """Return the smallest and the largest value of a part, in the order of their steps."""
    return sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})


def _running_means(parts: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the mean over a window around each part, at the step in the part's middle."""
    half = max(1, len(parts) // WINDOW // 2)
    sums, counts = [sum(value for _, value in part) for part in parts], [len(part) for part in parts]
    windows = [slice(max(0, i - half), i + half + 1) for i in range(len(parts))]
    return [
        (part[len(part) // 2][0], sum(sums[window]) / sum(counts[window]))
        for part, window in zip(parts, windows, strict=True)
    ]
