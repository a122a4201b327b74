"""Sample completions before and after, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from falign.report.metric_names import number
from falign.report.runs import MOST_COMPLETIONS, MOST_PROMPTS, Answer, Answers, ReportedRun, answers_of
from falign.report.sections.base import Section, missing, path_of
from falign.report.tables import Html, joined, legend, run_name, tag

__all__ = ["completions"]

TITLE = "Completions, before and after"


def completions(runs: Sequence[ReportedRun]) -> Section:
    """Show completions of the runs."""
    found: dict[str, list[tuple[ReportedRun, Answers]]] = {}
    for run in runs:
        for answers in answers_of(run):
            found.setdefault(answers.prompt, []).append((run, answers))
    if not found:
        line = missing(
            "No answers before and after: name prompts in `sampling.prompts` of the run file and train, or sample now:",
            f"falign sample {path_of(runs[0])} --prompt '...'",
        )
        return Section("completions", TITLE, line)
    note = ""
    if any(run.online for run in runs):
        counts = f"The first {MOST_PROMPTS} prompts and the first {MOST_COMPLETIONS} completions of each, as sampled"
        text = f"{counts}; all are in completions.jsonl."
        note = tag("p", text, attributes={"class": "note"})
    cards = [_card(prompt, answered, several=len(runs) > 1) for prompt, answered in found.items()]
    return Section("completions", TITLE, joined([legend(runs), note, *cards]))


def _card(prompt: str, answered: Sequence[tuple[ReportedRun, Answers]], *, several: bool) -> Html:
    starts: dict[tuple[str, tuple[Answer, ...]], list[ReportedRun]] = {}
    for run, answers in answered:
        starts.setdefault((answers.when[0], answers.before), []).append(run)
    cells = []
    for (when, answers), runs in starts.items():  # most runs start from the same model
        names = [part for run in runs for part in (" ", run_name(run))] if len(starts) > 1 else []
        cells.append(_cell([when, *names], answers, runs[0], trained=False))
    for run, answers in answered:
        name = [run_name(run), " "] if several else []
        cells.append(_cell([*name, answers.when[1]], answers.after, run, trained=True))
    head = tag("h3", tag("span", "Prompt "), tag("q", prompt, attributes={"dir": "auto"}))
    return tag("article", head, tag("div", *cells, attributes={"class": "answers"}), attributes={"class": "card"})


def _cell(head: Sequence[str], answers: Sequence[Answer], run: ReportedRun, *, trained: bool) -> Html:
    look = {"class": "answer after" if trained else "answer", "style": f"--run: var(--{run.color.name})"}
    texts = [tag("div", *_text(answer)) for answer in answers] or [tag("p", "none", attributes={"class": "note"})]
    return tag("section", tag("h4", *head), *texts, attributes=look)


def _text(answer: Answer) -> list[Html]:
    text = tag("p", answer.text or "(empty)", attributes={"class": "completion", "dir": "auto"})
    return [text] if answer.reward is None else [text, tag("small", f"reward {number(answer.reward)}")]
