"""Reports for people: one HTML file of one or more runs, and its plots as PNG files."""

from falign.report.metric_names import HELD_OUT
from falign.report.runs import ReportedRun, read_runs
from falign.report.writing import WrittenReport, report_path, write_report

__all__ = ["HELD_OUT", "ReportedRun", "WrittenReport", "read_runs", "report_path", "write_report"]
