"""Samples: their reward against divergence, their diversity, and pass@k."""

from __future__ import annotations

import re
from collections.abc import Sequence

from falign.evaluation.summaries import Estimate, Frontier, SampleSummary
from falign.report.drawing import Plot
from falign.report.metric_names import Number, divergence_label, fixed, number, share
from falign.report.runs import ReportedRun
from falign.report.sample_plots import BEFORE, frontier_plot, pass_plot
from falign.report.sections.base import Section, drawn, lacking, missing, sampling_command
from falign.report.tables import Html, details, interval, joined, legend, run_name, table, tag

__all__ = ["diversity", "frontier"]


TITLE = "Samples: reward, diversity, pass@k"
REFERENCE = "reference/"
LABELS = {
    "entropy": "entropy per token (nats)",
    "distinct-1": "different tokens (distinct-1)",
    "distinct-2": "different pairs of tokens (distinct-2)",
    "self_bleu": "self-BLEU (less is more diverse)",
    "unique": "different completions",
    "length": "length (tokens)",
    "clipped": "without an end",
}
ASIDE = re.compile(r"(pass@|reward/best_of_)\d+|divergence/[^/]+/(?!vocabulary$).*")
"""Values shown on demand: long series, and the noisier estimates of divergences."""
Found = Sequence[tuple[ReportedRun, SampleSummary]]


def diversity(runs: Sequence[ReportedRun]) -> Section:
    """Tabulate metrics of samples, and draw pass@k; online runs have the latter of their held-out prompts."""
    has = [run for run in runs if run.sampled]
    body: list[Html] = [legend(runs)]
    plots: list[Plot | None] = []
    for name in dict.fromkeys(name for run in has for name in run.sampled):
        found = [(run, run.sampled[name]) for run in has if name in run.sampled]
        body += [tag("h3", name), _about(found), _metrics(name, found)]
        plots.append(pass_plot(f"pass@k of {name}", [(run, summary.metrics, "") for run, summary in found]))
    held_out = [(run, _estimates(run.before), BEFORE) for run in runs] + [
        (run, _estimates(run.after), "") for run in runs
    ]
    plots.append(pass_plot("pass@k held out", held_out))
    grid, pictures = drawn([plot for plot in plots if plot is not None])
    body += [grid] if pictures else []
    if not has:
        body.append(missing("Samples are not measured yet:", sampling_command(runs[0])))
    return Section("diversity", TITLE, joined([*body, lacking(runs, has, sampling_command)]), pictures)


def _about(found: Found) -> Html:
    """Describe the samples, once if they are the same for all runs."""
    sources = {summary.source for _, summary in found if summary.source is not None}
    descriptions = list(dict.fromkeys(_description(summary) for _, summary in found))
    source = f", from {sources.pop()}" if len(sources) == 1 else ""
    return tag("p", "; ".join(descriptions), f"{source}.", attributes={"class": "note"})


def _description(summary: SampleSummary) -> str:
    settings = [
        f"{name.replace('_', ' ')} {summary.sampling[name]}"
        for name in ("temperature", "max_new_tokens")
        if name in summary.sampling
    ]
    return ", ".join([f"{summary.num_prompts} prompts with {summary.num_completions} completions each", *settings])


def _metrics(name: str, found: Found) -> Html:
    """Tabulate the metrics of each run beside those of the reference; further ones on demand."""
    names = dict.fromkeys(metric.removeprefix(REFERENCE) for _, summary in found for metric in summary.metrics)
    columns = [*_references(found), *((run_name(run), summary.metrics) for run, summary in found)]
    head = ["", *(column for column, _ in columns)]
    rows = {metric: [_label(metric), *(_cell(metric, values) for _, values in columns)] for metric in names}
    main = [row for metric, row in rows.items() if not ASIDE.fullmatch(metric)]
    aside = [row for metric, row in rows.items() if ASIDE.fullmatch(metric)]
    shown = table(f"Samples of {name}", head, main, quiet=True)
    if not aside:
        return shown
    more = table(f"Samples of {name}: other values", head, aside, quiet=True)
    return joined([shown, details("For each k, and divergences by other estimates", more)])


def _references(found: Found) -> list[tuple[Html, dict[str, Estimate]]]:
    """Return the samples of the reference, once if they are the same for all runs."""
    measured = [
        (
            run,
            {key.removeprefix(REFERENCE): value for key, value in summary.metrics.items() if key.startswith(REFERENCE)},
        )
        for run, summary in found
    ]
    measured = [(run, metrics) for run, metrics in measured if metrics]
    if not measured:
        return []
    if all(metrics == measured[0][1] for _, metrics in measured):
        return [(tag("span", "reference"), measured[0][1])]
    return [(joined([run_name(run), ", reference"]), metrics) for run, metrics in measured]


def _cell(metric: str, values: dict[str, Estimate]) -> Html:
    return interval(values.get(metric), share if metric.startswith("pass@") else fixed)


def _estimates(values: dict[str, Number]) -> dict[str, Estimate]:
    return {name: Estimate(value=value) for name, value in values.items()}


def _label(metric: str) -> str:
    kind, _, rest = metric.partition("/")
    if kind != "divergence":
        return LABELS.get(metric, metric)
    name, _, estimator = rest.partition("/")
    how = {"": "", "vocabulary": ", over the vocabulary"}.get(estimator, f", by {estimator.replace('_', ' ')}")
    return f"{divergence_label(name)}{how} (nats)"


FRONTIER_TITLE = "Frontier: reward against divergence"


def frontier(runs: Sequence[ReportedRun]) -> Section:
    """Show reward against divergence of each run, and the ideal frontiers."""
    groups = _groups(runs)
    has = [run for run in runs if any(run is other for found in groups.values() for other, _, _ in found)]
    if not has:
        return Section("frontier", FRONTIER_TITLE, missing("Not measured yet:", sampling_command(runs[0])))
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
        "frontier",
        FRONTIER_TITLE,
        joined([legend(runs), grid, *tables, lacking(runs, has, sampling_command)]),
        pictures,
    )


def _groups(
    runs: Sequence[ReportedRun],
) -> dict[tuple[str, str], list[tuple[ReportedRun, SampleSummary, Frontier]]]:
    """Group the evaluations by plot: the same prompts and the same axis."""
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
