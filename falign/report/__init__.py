"""Reports: one HTML page on one or more runs, and its plots as PNG files.

The package can be called: ``falign.report(["runs/a", "runs/b"], "comparison.html")`` is :func:`write_report`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from falign.report.metric_names import held_out_rows
from falign.report.runs import ReportedRun, read_runs
from falign.report.writing import WrittenReport, report_path, write_report
from falign.runs.loading import Named, each_named

__all__ = ["ReportedRun", "WrittenReport", "held_out_rows", "read_runs", "report_path", "write_report"]


class _Report(ModuleType):
    """The type of this module, which makes it callable."""

    def __call__(self, runs: Named | Sequence[Named], out: str | Path | None = None) -> WrittenReport:
        return write_report(each_named(runs, field="runs"), out)


sys.modules[__name__].__class__ = _Report
