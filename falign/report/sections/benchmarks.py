"""Reward benchmarks: scores with intervals, calibration, and omitted items."""

from __future__ import annotations

from collections.abc import Sequence

from falign.evaluation.summaries import Estimate, RewardSummary
from falign.report.metric_names import fixed, share
from falign.report.runs import ReportedRun
from falign.report.sample_plots import reliability_plot, score_plot
from falign.report.sections.base import Section, drawn, lacking, missing, path_of
from falign.report.tables import Html, details, interval, joined, legend, run_name, table, tag

__all__ = ["benchmarks"]

TITLE = "Reward benchmarks"
Found = Sequence[tuple[ReportedRun, RewardSummary]]


def command(run: ReportedRun) -> str:
    """Return the command that measures a run on a benchmark."""
    return f"falign evaluate rewards {path_of(run)} rm_bench"


def benchmarks(runs: Sequence[ReportedRun]) -> Section:
    """Show the accuracy and the calibration of each run's implicit reward."""
    has = [run for run in runs if run.rewards]
    if not has:
        return Section("benchmarks", TITLE, missing("Not measured yet:", command(runs[0])))
    body: list[Html] = [legend(runs)]
    pictures = ()
    for name in dict.fromkeys(name for run in has for name in run.rewards):
        found = [(run, run.rewards[name]) for run in has if name in run.rewards]
        plots = [score_plot(name, found), reliability_plot(name, found)]
        grid, new = drawn([plot for plot in plots if plot is not None])
        pictures += new
        body += [
            tag("h3", name),
            _about(found),
            _scorers(name, found),
            grid,
            _sections(name, found),
            _calibration(name, found),
        ]
    body.append(lacking(runs, has, command))
    return Section("benchmarks", TITLE, joined(body), pictures)


def _about(found: Found) -> Html:
    """Describe the measured items, once if they are the same for all runs."""
    lines = []
    for _, summary in found:
        skipped = ", ".join(f"{count} {reason}" for reason, count in summary.skipped.items() if count)
        parts = [f"{summary.num_items} items of {summary.source or summary.benchmark}"]
        parts += [f"left out: {skipped}"] if skipped else []
        absent = ", ".join(summary.missing_subsets)
        parts += [f"no score, because {absent} are missing; the plain mean replaces it"] if absent else []
        lines.append("; ".join(parts))
    if len(set(lines)) == 1:
        return tag("p", f"{lines[0]}.", attributes={"class": "note"})
    items = [tag("li", run_name(run), f": {line}") for (run, _), line in zip(found, lines, strict=True)]
    return tag("ul", *items, attributes={"class": "note"})


def _scorers(name: str, found: Found) -> Html:
    scorers = list(dict.fromkeys(scorer for _, summary in found for scorer in summary.scorers))
    rows = [
        [run_name(run), *(interval(_whole(summary, scorer), share) for scorer in scorers)] for run, summary in found
    ]
    return table(f"Score on {name} by scorer, with intervals", ["run", *map(_spoken, scorers)], rows, stacked=True)


def _sections(name: str, found: Found) -> Html:
    """Tabulate the parts of the benchmark under the main scorer, and under the others on demand."""
    scorers = dict.fromkeys([found[0][1].main_scorer, *(scorer for _, summary in found for scorer in summary.scorers)])
    tables = []
    for scorer in scorers:
        parts = dict.fromkeys(
            part
            for _, summary in found
            if scorer in summary.scorers
            for part in summary.scorers[scorer].scores
            if part != summary.scorers[scorer].whole
        )
        rows = [[part, *(interval(_score(summary, scorer, part), share) for _, summary in found)] for part in parts]
        if rows:
            caption = f"Parts of {name}: {_spoken(scorer)}"
            tables.append(table(caption, ["part", *(run_name(run) for run, _ in found)], rows))
    if len(tables) < 2:
        return joined(tables)
    return joined([tables[0], details("Parts under the other scorers", *tables[1:])])


def _calibration(name: str, found: Found) -> Html:
    rows = [
        [
            run_name(run),
            _spoken(scorer),
            interval(scored.calibration.ece, fixed),
            interval(scored.calibration.brier, fixed),
        ]
        for run, summary in found
        for scorer, scored in summary.scorers.items()
        if scored.calibration is not None
    ]
    if not rows:
        return Html("")
    return table(f"Calibration on {name}", ["run", "scorer", "expected calibration error", "Brier"], rows)


def _whole(summary: RewardSummary, scorer: str) -> Estimate | None:
    return _score(summary, scorer, summary.scorers[scorer].whole) if scorer in summary.scorers else None


def _score(summary: RewardSummary, scorer: str, part: str) -> Estimate | None:
    return summary.scorers[scorer].scores.get(part) if scorer in summary.scorers else None


def _spoken(scorer: str) -> str:
    return scorer.replace("_", " ")
