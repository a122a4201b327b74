"""Evaluations by LLM judges: scores and win rates, one table for each judge, mode and baseline."""

from __future__ import annotations

from collections.abc import Sequence

from falign.evaluation.summaries import JudgeSummary
from falign.report.metric_names import number, share
from falign.report.runs import ReportedRun
from falign.report.sections.base import Section, lacking, missing, path_of
from falign.report.tables import Html, details, interval, joined, legend, run_name, table, tag

__all__ = ["judged"]

TITLE = "LLM judges"
Found = Sequence[tuple[ReportedRun, JudgeSummary]]
MAIN = {"single": "score", "pairwise": "win_rate"}
LABELS = {
    "score": "score",
    "win_rate": "win rate",
    "won": "won",
    "tied": "tied",
    "lost": "lost",
    "position_bias": "position bias",
    "length": "mean characters",
    "length/baseline": "the baseline's",
}


def command(run: ReportedRun) -> str:
    """Return the command that lets a judge score a run."""
    return f"falign evaluate judge {path_of(run)} mt_bench question.jsonl --judge judge.yaml"


def judged(runs: Sequence[ReportedRun]) -> Section:
    """Show the scores and win rates of each run; those of different judges, questions or baselines stand apart."""
    has = [run for run in runs if run.judged]
    if not has:
        return Section("judged", TITLE, missing("Not measured yet:", command(runs[0])))
    groups: dict[str, list[tuple[ReportedRun, JudgeSummary]]] = {}
    for run in has:
        for summary in run.judged.values():
            groups.setdefault(summary.measured_on, []).append((run, summary))
    body = [legend(runs)]
    for found in groups.values():
        body += _tables(found)
    body.append(lacking(runs, has, command))
    return Section("judged", TITLE, joined(body))


def _tables(found: Found) -> list[Html]:
    _, first = found[0]
    against = "" if first.baseline is None else f" against {first.baseline}"
    title = f"{first.benchmark}, {first.mode}{against}, by {first.judge}"
    failed = sum(summary.failures for _, summary in found)
    about = (
        f"{first.num_questions} questions, pairs in both orders."
        if first.baseline
        else f"{first.num_questions} questions."
    )
    about += f" {failed} answers have no verdict and are not counted." if failed else ""
    main = MAIN[first.mode]
    names = [name for name in LABELS if any(name in summary.metrics for _, summary in found)]
    rows = [[run_name(run), *(_cell(summary, name) for name in names)] for run, summary in found]
    parts = dict.fromkeys(name for _, each in found for name in each.metrics if name.startswith(f"{main}/"))
    by_part = [[part.partition("/")[2], *(_cell(summary, part) for _, summary in found)] for part in parts]
    whole = table(f"Results on {title}", ["run", *(LABELS[name] for name in names)], rows, stacked=True)
    columns = ["part", *(run_name(run) for run, _ in found)]
    inner = [details("By turn and category", table(f"Parts of {title}", columns, by_part))] if by_part else []
    return [tag("h3", title), tag("p", about, attributes={"class": "note"}), whole, *inner]


def _cell(summary: JudgeSummary, name: str) -> Html:
    style = number if name.startswith(("score", "length")) else share
    return interval(summary.metrics.get(name), style)
