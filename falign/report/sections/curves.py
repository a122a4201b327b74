"""Curves over the steps."""

from __future__ import annotations

from collections.abc import Sequence

from falign.report.curves import curve_plots
from falign.report.html import joined, tag
from falign.report.runs import ReportedRun
from falign.report.sections.base import Section, drawn, missing, path_of
from falign.report.tables import legend

__all__ = ["curves"]

SURROGATES = frozenset({"policy_gradient", "distribution_matching", "hybrid"})


def curves(runs: Sequence[ReportedRun]) -> Section:
    """Draw every metric of training and of held-out data."""
    plots = curve_plots(runs)
    if not plots:
        command = f"falign train {path_of(runs[0])}/run.yaml --resume"
        return Section("curves", "Curves", missing("No step has been logged yet.", command))
    grid, pictures = drawn(plots)
    note = ""
    if any(run.run_file["objective"].get("kind") in SURROGATES for run in runs):
        note = tag(
            "p",
            "The loss of an objective on own samples is a surrogate: its gradient is what is wanted, its value says "
            "nothing of progress.",
            attributes={"class": "note"},
        )
    return Section("curves", "Curves", joined([legend(runs), note, grid]), pictures)
