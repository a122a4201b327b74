"""Plots of evaluations: reward benchmarks, pass@k, and reward against divergence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from falign.evaluation.summaries import Estimate, Frontier, RewardSummary, SampleSummary
from falign.report.drawing import DASHED, DOTTED, SOLID, Line, Plot, Series, file_name
from falign.report.metric_names import Number, divergence_label
from falign.report.palette import MUTED
from falign.report.runs import ReportedRun

__all__ = ["BEFORE", "frontier_plot", "pass_plot", "reliability_plot", "score_plot"]


BEFORE = "before"
PASS = re.compile(r"pass@(\d+)")
IDEAL_LINES: tuple[Line, ...] = (DOTTED, (5, 2), (3, 1.5, 1, 1.5), (8, 2), (2, 2), (5, 1.5, 1, 1.5, 1, 1.5))
FEW = 5.0
"""Effective number of samples per prompt below which the line of an optimum is pale."""


def pass_plot(title: str, found: Sequence[tuple[ReportedRun, Mapping[str, Estimate], str]]) -> Plot | None:
    """Return pass@k over k.

    Args:
        title: Title of the plot.
        found: Runs with metrics and the time of measurement; lines of ``before`` are dashed.
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
    """Return reward against divergence: runs as marks, best of n and the optimum of each divergence as lines.

    Args:
        name: Name of the evaluation.
        found: Runs with evaluations on the same axis; several ones of a run are its checkpoints.
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
        caption=f"marks: trained; lines: the best that each divergence allows, and best of n; pale: few samples "
        f"support it{source}",
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
    """Return the coordinates of the finite points, from left to right."""
    there = sorted((x, y) for x, y in points if x is not None and y is not None and math.isfinite(x + y))
    return [x for x, _ in there], [y for _, y in there]


BASELINES = ("length", "random")
FEW_BARS = 10
"""Number of items in a bin below which it is pale."""


def score_plot(name: str, found: Sequence[tuple[ReportedRun, RewardSummary]]) -> Plot | None:
    """Return the benchmark's score of each run and of the baselines."""
    rows = list(_rows(found))
    if not rows:
        return None
    return Plot(
        f"scores-{file_name(name)}",
        f"Score on {name}",
        "score",
        "",
        tuple(rows),
        caption="each run with its interval; gray: baselines",
        categories=tuple(row.label for row in rows),
        size=(4.2, 0.9 + 0.34 * max(2, len(rows))),
    )


def _rows(found: Sequence[tuple[ReportedRun, RewardSummary]]) -> Iterator[Series]:
    wanted = [(run.label, run.color.light, run.marker, summary, summary.main_scorer) for run, summary in found]
    wanted += [(scorer, MUTED.light, "|", found[0][1], scorer) for scorer in BASELINES]
    place = 0
    for label, color, marker, summary, scorer in wanted:
        scored = summary.scorers.get(scorer)
        score = None if scored is None else scored.scores.get(scored.whole)
        if score is None or score.value is None:
            continue
        low, high = (None, None) if score.low is None or score.high is None else ([score.low], [score.high])
        yield Series(label, [score.value], [place], color, line=None, marker=marker, low=low, high=high)
        place += 1


def reliability_plot(name: str, found: Sequence[tuple[ReportedRun, RewardSummary]]) -> Plot | None:
    """Return the accuracy of the reward against its confidence."""
    series = []
    for run, summary in found:
        scorer = summary.scorers.get(summary.main_scorer)
        bins = scorer.calibration.bins if scorer is not None and scorer.calibration is not None else ()
        for few in (True, False):
            points = [
                (each.confidence, each.accuracy)
                for each in bins
                if each.count
                and (each.count < FEW_BARS) == few
                and each.confidence is not None
                and each.accuracy is not None
            ]
            if points:
                x, y = zip(*points, strict=True)
                line = None if few else SOLID
                series.append(Series(run.label, x, y, run.color.light, line=line, marker=run.marker, faint=few))
    if not series:
        return None
    return Plot(
        f"reliability-{file_name(name)}",
        f"Reliability on {name}",
        "confidence",
        "accuracy",
        (Series("calibrated", [0.5, 1.0], [0.5, 1.0], MUTED.light, line=DOTTED), *series),
        caption=f"dotted: confidence equals accuracy; pale: fewer than {FEW_BARS} items",
        unit=True,
    )
