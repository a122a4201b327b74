"""What is drawn of samples: pass@k, and reward against divergence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from falign.report.drawing import DASHED, DOTTED, SOLID, Line, Plot, Series, file_name
from falign.report.evaluations import Estimate, Frontier, SampleSummary
from falign.report.metric_names import Number, divergence_label
from falign.report.palette import MUTED
from falign.report.runs import ReportedRun

__all__ = ["BEFORE", "frontier_plot", "pass_plot"]

BEFORE = "before"
PASS = re.compile(r"pass@(\d+)")
IDEAL_LINES: tuple[Line, ...] = (DOTTED, (5, 2), (3, 1.5, 1, 1.5), (8, 2), (2, 2), (5, 1.5, 1, 1.5, 1, 1.5))
FEW = 5.0
"""Samples of a prompt that carry an ideal; where they are fewer, its line is pale."""


def pass_plot(title: str, found: Sequence[tuple[ReportedRun, Mapping[str, Estimate], str]]) -> Plot | None:
    """Return pass@k over k.

    Args:
        title: Of the plot.
        found: Run, metrics, and when these were measured; those of ``before`` are dashed.
    """
    series = tuple(line for run, metrics, when in found for line in _passes(run, metrics, when))
    if not series:
        return None
    caption = "dashed: before training" if any(each.line == DASHED for each in series) else ""
    return Plot(file_name(title), title, "k", "prompts solved", series, caption=caption, powers=True, unit=True)


def _passes(run: ReportedRun, metrics: Mapping[str, Estimate], when: str) -> Iterator[Series]:
    found = sorted((int(match[1]), value) for name, value in metrics.items() if (match := PASS.fullmatch(name)))
    points = [(k, value.value, value.low, value.high) for k, value in found if value.value is not None]
    if len(points) < 2:
        return
    k, values, low, high = zip(*points, strict=True)
    whole = None not in low and None not in high
    yield Series(
        ", ".join(part for part in (run.label, when) if part),
        k,
        values,
        run.color.light,
        line=DASHED if when == BEFORE else SOLID,
        marker=run.marker,
        low=low if whole else None,
        high=high if whole else None,
    )


def frontier_plot(name: str, found: Sequence[tuple[ReportedRun, SampleSummary, Frontier]]) -> Plot:
    """Return reward against divergence: runs as marks, best of n and the ideal of each divergence as lines.

    Args:
        name: What the samples answer.
        found: Runs with their evaluations, of one axis; several of one run are its checkpoints.
    """
    with_anchors = [(run, frontier) for run, _, frontier in found if frontier.best_of_n or frontier.ideal]
    own = {summary.divergence: run.color.light for run, summary, _ in reversed(found)}
    series = [] if not with_anchors else [*_anchors(with_anchors[0][1], own)]
    runs = {run.index: run for run, _, _ in found}
    for run in runs.values():
        points = [point for other, _, frontier in found if other is run for point in frontier.points]
        x, y = _line((point.divergence, point.reward) for point in points)
        series.append(Series(run.label, x, y, run.color.light, marker=run.marker, line=SOLID if len(x) > 1 else None))
    source = f"; lines from {with_anchors[0][0].label}'s reference" if len(runs) > 1 and with_anchors else ""
    return Plot(
        f"frontier-{file_name(name)}",
        f"Frontier: {name}",
        f"{divergence_label(found[0][2].divergence)} to the reference (nats)",
        "reward",
        tuple(series),
        caption=f"marks: trained; lines: the best that each divergence allows, and best of n; pale where few samples "
        f"say so{source}",
        key=True,
        size=(5.4, 3.6),
    )


def _anchors(frontier: Frontier, own: Mapping[str | None, str]) -> Iterator[Series]:
    x, y = _line((point.divergence, point.reward) for point in frontier.best_of_n)
    if x:
        yield Series("best of n", x, y, MUTED.light, marker=".")
    for place, (name, ideal) in enumerate(sorted(frontier.ideal.items())):
        color, line = own.get(name, MUTED.light), IDEAL_LINES[place % len(IDEAL_LINES)]
        carried = [point for point in ideal if point.effective_samples is None or point.effective_samples >= FEW]
        x, y = _line((point.divergence, point.reward) for point in carried)
        if x:
            yield Series(f"ideal, {divergence_label(name)}", x, y, color, line=line)
        x, y = _line((point.divergence, point.reward) for point in ideal)
        if len(carried) < len(ideal) and x:
            yield Series("", x, y, color, line=line, faint=True)


def _line(points: Iterable[tuple[Number | None, Number | None]]) -> tuple[list[Number], list[Number]]:
    """Points from left to right; what is infinitely far away cannot be drawn."""
    there = sorted((x, y) for x, y in points if x is not None and y is not None and math.isfinite(x + y))
    return [x for x, _ in there], [y for _, y in there]
