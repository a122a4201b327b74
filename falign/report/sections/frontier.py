"""Reward against divergence."""

from __future__ import annotations

from collections.abc import Sequence

from falign.report.evaluation_plots import frontier_plot
from falign.report.html import joined
from falign.report.metric_names import divergence_label, number
from falign.report.runs import ReportedRun
from falign.report.sections.base import Section, drawn, lacking, missing, path_of
from falign.report.tables import details, legend, run_name, table

__all__ = ["frontier"]

TITLE = "Frontier: reward against divergence"
COMMAND = "falign evaluate samples RUN"


def frontier(runs: Sequence[ReportedRun]) -> Section:
    """Show how much reward each run has for how much divergence, and what would be possible."""
    has = [run for run in runs if any(found.frontier for found in run.sampled.values())]
    if not has:
        return Section("frontier", TITLE, missing("Not measured yet:", COMMAND.replace("RUN", path_of(runs[0]))))
    # Only what was measured on the same prompts, with the same axis, belongs into one plot.
    groups: dict[tuple[str, str | None, str], list] = {}
    for run in has:
        for name, found in run.sampled.items():
            if found.frontier is not None:
                groups.setdefault((name, found.source, found.frontier.divergence), []).append((run, found))
    plots, tables = [], []
    for (name, _, axis), found in groups.items():
        plots.append(frontier_plot(name, found))
        rows = [
            [run_name(run), point.label or run.label, number(point.divergence), number(point.reward)]
            for run, summary in found
            for point in summary.frontier.points
        ]
        head = ["run", "point", f"{divergence_label(axis)} (nats)", "reward"]
        tables.append(details(f"Points of {name}", table(f"Points of the frontier of {name}", head, rows)))
    grid, pictures = drawn(plots, wide=True)
    return Section("frontier", TITLE, joined([legend(runs), grid, *tables, lacking(runs, has, COMMAND)]), pictures)
