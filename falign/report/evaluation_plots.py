"""What is drawn of evaluations: scores of benchmarks, reliability, pass@k, and the frontier."""

from __future__ import annotations

import re
from collections.abc import Sequence

from falign.report.drawing import DASHED, DOTTED, SOLID, Line, Plot, Series
from falign.report.evaluations import Estimate, Frontier, RewardSummary, SampleSummary
from falign.report.metric_names import divergence_label
from falign.report.palette import MUTED
from falign.report.runs import ReportedRun

__all__ = ["MAIN_SCORER", "frontier_plot", "pass_plot", "reliability_plot", "score_plot", "slug"]

MAIN_SCORER = "implicit_reward"
PASS = re.compile(r"pass@(\d+)")
IDEAL_LINES: tuple[Line, ...] = (DOTTED, (5, 2), (3, 1.5, 1, 1.5), (8, 2), (2, 2), (5, 1.5, 1, 1.5, 1, 1.5))


def slug(name: str) -> str:
    """Return a name as a part of a file's name.

    Example:
        >>> slug("RM-Bench (hard)")
        'rm-bench-hard'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "x"


def score_plot(name: str, found: Sequence[tuple[ReportedRun, RewardSummary]]) -> Plot:
    """Return the benchmark's score of each run and of the baselines."""
    series, categories = [], []
    for run, summary in found:
        for scorer, chosen in ((MAIN_SCORER, run.color.light), ("length", MUTED.light), ("random", MUTED.light)):
            if scorer in summary.scorers and (scorer == MAIN_SCORER or run is found[-1][0]):
                label = run.label if scorer == MAIN_SCORER else scorer
                score = summary.scorers[scorer].scores.get("score")
                if score is not None and score.value is not None:
                    marker = run.marker if scorer == MAIN_SCORER else "|"
                    series.append(_whisker(label, score, len(categories), chosen, marker))
                    categories.append(label)
    return Plot(
        f"scores-{slug(name)}",
        f"Score on {name}",
        "score",
        "",
        tuple(series),
        caption="implicit reward of each run, with its interval; grey: baselines",
        categories=tuple(categories),
        size=(4.2, 0.9 + 0.34 * max(2, len(categories))),
    )


def _whisker(label: str, score: Estimate, place: int, color: str, marker: str) -> Series:
    assert score.value is not None
    low, high = (None, None) if score.low is None or score.high is None else ([score.low], [score.high])
    return Series(label, [score.value], [place], color, line=None, marker=marker, low=low, high=high)


def reliability_plot(name: str, found: Sequence[tuple[ReportedRun, RewardSummary]]) -> Plot | None:
    """Return how often the preferred completion has the larger reward, over how sure the reward is of it."""
    series = []
    for run, summary in found:
        calibration = summary.scorers[MAIN_SCORER].calibration if MAIN_SCORER in summary.scorers else None
        bins = [
            (each.confidence, each.accuracy)
            for each in (calibration.bins if calibration else ())
            if each.count and each.confidence is not None and each.accuracy is not None
        ]
        if bins:
            x, y = zip(*bins, strict=True)
            series.append(Series(run.label, x, y, run.color.light, marker=run.marker))
    if not series:
        return None
    ideal = Series("calibrated", [0.5, 1.0], [0.5, 1.0], MUTED.light, line=DOTTED)
    caption = "dotted: confidence equals accuracy; below it the reward is too sure"
    return Plot(
        f"reliability-{slug(name)}",
        f"Reliability on {name}",
        "confidence",
        "accuracy",
        (ideal, *series),
        caption=caption,
        unit=True,
    )


def pass_plot(title: str, found: Sequence[tuple[ReportedRun, dict[str, Estimate], str]]) -> Plot | None:
    """Return pass@k over k.

    Args:
        title: Of the plot.
        found: Run, metrics, and what the metrics are of (``before``, drawn dashed, or anything else).
    """
    series = []
    for run, metrics, what in found:
        points = sorted((int(match[1]), value) for name, value in metrics.items() if (match := PASS.fullmatch(name)))
        points = [(k, value) for k, value in points if value.value is not None]
        if len(points) < 2:
            continue
        low = [value.low for _, value in points]
        high = [value.high for _, value in points]
        whole = None not in low and None not in high
        series.append(
            Series(
                ", ".join(part for part in (run.label, what) if part),
                [k for k, _ in points],
                [value.value for _, value in points],  # pyright: ignore[reportArgumentType]
                run.color.light,
                line=DASHED if what == "before" else SOLID,
                marker=run.marker,
                low=low if whole else None,  # pyright: ignore[reportArgumentType]
                high=high if whole else None,  # pyright: ignore[reportArgumentType]
            )
        )
    if not series:
        return None
    dashed = "dashed: before training" if any(what == "before" for _, _, what in found) else ""
    return Plot(slug(title), title, "k", "prompts solved", tuple(series), caption=dashed, powers=True, unit=True)


def frontier_plot(name: str, found: Sequence[tuple[ReportedRun, SampleSummary]]) -> Plot | None:
    """Return reward against divergence: runs as marks, best of n and the ideal of each divergence as lines."""
    drawn = [(run, summary, summary.frontier) for run, summary in found if summary.frontier is not None]
    if not drawn:
        return None
    anchor_run, _, anchor = drawn[0]
    own = {summary.divergence: run.color.light for run, summary, _ in reversed(drawn)}
    series = [*_anchors(anchor, own)]
    for run, _, frontier in drawn:
        points = sorted(frontier.points, key=lambda point: point.divergence)
        if points:
            x, y = [point.divergence for point in points], [point.reward for point in points]
            series.append(
                Series(run.label, x, y, run.color.light, marker=run.marker, line=None if len(x) == 1 else SOLID)
            )
    axis = divergence_label(anchor.divergence)
    source = f" (reference samples of {anchor_run.label})" if len(drawn) > 1 else ""
    return Plot(
        f"frontier-{slug(name)}",
        f"Frontier of {name}",
        f"{axis} to the reference (nats)",
        "reward",
        tuple(series),
        caption=f"marks: trained; lines: what the divergence allows at best, and best of n{source}",
        key=True,
        size=(5.4, 3.6),
    )


def _anchors(frontier: Frontier, own: dict[str | None, str]) -> list[Series]:
    series = []
    if frontier.best_of_n:
        x = [point.divergence for point in frontier.best_of_n]
        y = [point.reward for point in frontier.best_of_n]
        series.append(Series("best of n", x, y, MUTED.light, marker="."))
    for place, (name, ideal) in enumerate(sorted(frontier.ideal.items())):
        line = IDEAL_LINES[place % len(IDEAL_LINES)]
        points = sorted((point.divergence, point.reward) for point in ideal)
        if points:
            x, y = [at for at, _ in points], [reward for _, reward in points]
            label = f"ideal, {divergence_label(name)}"
            series.append(Series(label, x, y, own.get(name, MUTED.light), line=line))
    return series
