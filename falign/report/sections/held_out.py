"""Before and after training: curves, held-out values, and sample completions."""

from __future__ import annotations

from collections.abc import Sequence

from falign.report.curves import curve_plots
from falign.report.metric_names import Number, held_out_rows, number, written
from falign.report.runs import MOST_COMPLETIONS, MOST_PROMPTS, Answer, Answers, ReportedRun, answers_of
from falign.report.sections.base import Section, drawn, missing, path_of
from falign.report.tables import Html, details, joined, legend, run_name, table, tag

__all__ = ["completions", "curves", "held_out"]


TITLE = "Held out, before and after"


def held_out(runs: Sequence[ReportedRun]) -> Section:
    """Tabulate the held-out values of each run before and after training."""
    found = [run for run in runs if run.before]
    lines = []
    if running := [run for run in runs if not run.ended]:
        names = ", ".join(run.label for run in running)
        text = f"Not ended: {names}. Values after training appear when it has ended; resume a stopped run by"
        lines.append(missing(text, f"falign train {path_of(running[0])}/run.yaml --resume"))
    if len(found) < len(runs):
        fields = "`data.eval_size` or `prompts.eval_size`"
        names = ", ".join(run.label for run in runs if run not in found)
        lines.append(
            missing(f"No data is held out in {names}: set {fields} in the run file and train:", "falign train RUN.yaml")
        )
    if not found:
        return Section("held-out", TITLE, joined(lines))
    main = held_out_rows(metric for run in found for metric in run.before)
    shown = {metric for _, metric, _ in main}
    rest = sorted({metric for run in found for metric in run.before} - shown)
    body = [_table("Held-out means", found, main), *lines]
    if rest:
        body.append(
            details(
                f"All {len(rest)} other held-out values",
                _table(
                    "Other held-out means, by the names of metrics.jsonl",
                    found,
                    [(metric, metric, "") for metric in rest],
                ),
            )
        )
    return Section("held-out", TITLE, joined(body))


def _table(caption: str, runs: Sequence[ReportedRun], rows: Sequence[tuple[str, str, str]]) -> Html:
    def cell(values: dict[str, Number], metric: str, style: str) -> str:
        return written(values.get(metric), style) if style else number(values.get(metric))

    return table(
        caption,
        ["", *(when for _ in runs for when in ("before", "after"))],
        [
            [label, *(cell(values, metric, style) for run in runs for values in (run.before, run.after))]
            for label, metric, style in rows
        ],
        groups=[(run_name(run), 2) for run in runs],
        quiet=True,
    )


def curves(runs: Sequence[ReportedRun]) -> Section:
    """Draw every metric of training and of held-out data."""
    plots = curve_plots(runs)
    if not plots:
        command = f"falign train {path_of(runs[0])}/run.yaml --resume"
        return Section("curves", "Curves", missing("No step has been logged yet.", command))
    grid, pictures = drawn(plots)
    note = ""
    if any(run.objective_section.is_surrogate for run in runs):
        note = tag(
            "p",
            "The loss of an objective on own samples is a surrogate: its gradient is what is wanted, its value says "
            "nothing of progress.",
            attributes={"class": "note"},
        )
    return Section("curves", "Curves", joined([legend(runs), note, grid]), pictures)


COMPLETIONS_TITLE = "Completions, before and after"


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
        return Section("completions", COMPLETIONS_TITLE, line)
    note = ""
    if any(run.online for run in runs):
        counts = f"The first {MOST_PROMPTS} prompts and the first {MOST_COMPLETIONS} completions of each, as sampled"
        text = f"{counts}; all are in completions.jsonl."
        note = tag("p", text, attributes={"class": "note"})
    cards = [_card(prompt, answered, several=len(runs) > 1) for prompt, answered in found.items()]
    return Section("completions", COMPLETIONS_TITLE, joined([legend(runs), note, *cards]))


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
