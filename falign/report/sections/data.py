"""Counts of the training data of each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from falign.report.metric_names import NOTHING
from falign.report.runs import ReportedRun
from falign.report.sections.base import Section
from falign.report.tables import joined, run_name, table, tag

__all__ = ["data"]

COUNTS = {
    "read": "rows read",
    "bad": "bad rows",
    "kept": "rows kept",
    "prompts_cut": "prompts cut",
    "completions_cut": "completions cut",
    "drifting": "prompts that merge with an answer",
    "reopened": "answers opened otherwise than prompted",
    "prompts": "distinct prompts",
    "duplicates": "duplicate rows",
    "contradictions": "contradicting rows",
}
TOTALS = {
    "num_train": "to train on",
    "num_eval": "held out",
    "shared_prompts": "held-out prompts also in training",
    "cut": "prompts cut",
    "dropped": "prompts too long",
    "bad": "bad rows",
}


def data(runs: Sequence[ReportedRun]) -> Section:
    """Tabulate rows and sources."""
    reports = [run.manifest["data"] for run in runs]
    totals = [
        [label, *(_count(report.get(name)) for report in reports)]
        for name, label in TOTALS.items()
        if any(name in report for report in reports)
    ]
    body = [table("Rows", ["", *map(run_name, runs)], totals)]
    sources = _sources(runs)
    if sources:
        labels = ["use", "format", *COUNTS.values(), "dropped"]
        rows = [[label, *(cells[i] for cells in sources.values())] for i, label in enumerate(labels)]
        body.append(table("Sources", ["", *(tag("code", place) for place in sources)], rows))
    prompts = [[run_name(run), ", ".join(_prompt_sources(run))] for run in runs if run.online]
    if prompts:
        body.append(table("Prompts", ["run", "sources"], prompts, text=True))
    messages = [tag("li", message) for report in reports for message in report.get("messages", ())]
    if messages:
        body.append(tag("ul", *messages))
    return Section("data", "Data", joined(body))


def _sources(runs: Sequence[ReportedRun]) -> dict[str, list[str]]:
    """List each source once, even if several runs read it; a different count makes another row."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        for use, name in (("training", "sources"), ("held out", "eval_sources")):
            for source in run.manifest["data"].get(name, ()):
                cells = [
                    use,
                    source["format"],
                    *(_count(source.get(count)) for count in COUNTS),
                    _dropped(source["dropped"]),
                ]
                place = source["path"]
                if rows.get(place, cells) != cells:
                    place = f"{place} ({run.label})"
                rows[place] = cells
    return rows


def _prompt_sources(run: ReportedRun) -> list[str]:
    return [source["path"] or f"{len(source['texts'])} in the run file" for source in run.run_file["prompts"]["train"]]


def _dropped(reasons: Mapping[str, Any]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items())) or "0"


def _count(value: Any) -> str:
    return NOTHING if value is None else f"{value:,}".replace(",", "\u202f")
