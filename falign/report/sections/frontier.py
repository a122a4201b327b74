"""Reward against divergence."""

from __future__ import annotations

from collections.abc import Sequence

from falign.report.evaluations import Frontier, SampleSummary
from falign.report.html import joined
from falign.report.metric_names import divergence_label, number
from falign.report.runs import ReportedRun
from falign.report.sample_plots import frontier_plot
from falign.report.sections.base import Section, drawn, lacking, missing, sampling_command
from falign.report.tables import details, legend, run_name, table

__all__ = ["frontier"]

TITLE = "Frontier: reward against divergence"


def frontier(runs: Sequence[ReportedRun]) -> Section:
    """Show how much reward each run has for how much divergence, and what would be possible."""
    groups = _groups(runs)
    has = [run for run in runs if any(run is other for found in groups.values() for other, _, _ in found)]
    if not has:
        return Section("frontier", TITLE, missing("Not measured yet:", sampling_command(runs[0])))
    plots, tables = [], []
    for (name, axis), found in groups.items():
        plots.append(frontier_plot(name, found))
        rows = [
            [run_name(run), point.label or summary.name, number(point.divergence), number(point.reward)]
            for run, summary, measured in found
            for point in measured.points
        ]
        head = ["run", "point", f"{divergence_label(axis)} (nats)", "reward"]
        tables.append(details(f"Points of {name}", table(f"Points of the frontier: {name}", head, rows)))
    grid, pictures = drawn(plots, wide=True)
    return Section(
        "frontier", TITLE, joined([legend(runs), grid, *tables, lacking(runs, has, sampling_command)]), pictures
    )


def _groups(
    runs: Sequence[ReportedRun],
) -> dict[tuple[str, str], list[tuple[ReportedRun, SampleSummary, Frontier]]]:
    """What belongs into one plot, by its name and axis: measured on the same prompts, with the same axis."""
    groups: dict[tuple[str, str], list[tuple[ReportedRun, SampleSummary, Frontier]]] = {}
    for run in runs:
        for summary in run.sampled.values():
            if summary.frontier is not None:
                key = (summary.measured_on, summary.frontier.divergence)
                groups.setdefault(key, []).append((run, summary, summary.frontier))
    named: dict[tuple[str, str], list[tuple[ReportedRun, SampleSummary, Frontier]]] = {}
    for (_, axis), found in groups.items():
        name = found[0][1].name
        name = name if (name, axis) not in named else f"{name} ({len(named) + 1})"
        named[name, axis] = found
    return named
