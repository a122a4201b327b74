"""What is drawn of a reward benchmark: scores beside baselines, and how reliable the reward is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from falign.report.drawing import DOTTED, SOLID, Plot, Series, file_name
from falign.report.evaluations import RewardSummary
from falign.report.palette import MUTED
from falign.report.runs import ReportedRun

__all__ = ["reliability_plot", "score_plot"]

BASELINES = ("length", "random")
FEW = 10
"""Items of a bin; fewer say little of it."""


def score_plot(name: str, found: Sequence[tuple[ReportedRun, RewardSummary]]) -> Plot | None:
    """Return the benchmark's score of each run, and of the baselines, which no run changes."""
    rows = list(_rows(found))
    if not rows:
        return None
    return Plot(
        f"scores-{file_name(name)}",
        f"Score on {name}",
        "score",
        "",
        tuple(rows),
        caption="each run with its interval; grey: baselines",
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
    """Return how often the preferred completion has the larger reward, over how sure the reward is of it."""
    series = []
    for run, summary in found:
        scorer = summary.scorers.get(summary.main_scorer)
        bins = scorer.calibration.bins if scorer is not None and scorer.calibration is not None else ()
        for few in (True, False):
            points = [
                (each.confidence, each.accuracy)
                for each in bins
                if each.count
                and (each.count < FEW) == few
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
        caption=f"dotted: confidence equals accuracy; pale: fewer than {FEW} items",
        unit=True,
    )
