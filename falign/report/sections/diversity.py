"""What samples are worth and how different they are: rewards, divergences, diversity, pass@k."""

from __future__ import annotations

from collections.abc import Sequence

from falign.report.drawing import Plot
from falign.report.evaluation_plots import pass_plot
from falign.report.evaluations import Estimate
from falign.report.html import Html, joined, tag
from falign.report.metric_names import divergence_label, fixed, share
from falign.report.runs import ReportedRun
from falign.report.sections.base import Section, drawn, lacking, missing, path_of
from falign.report.tables import interval, legend, run_name, table

__all__ = ["diversity"]

TITLE = "Samples: reward, diversity, pass@k"
COMMAND = "falign evaluate samples RUN"
LABELS = {
    "reward": "reward",
    "entropy": "entropy per token (nats)",
    "distinct-1": "different words (distinct-1)",
    "distinct-2": "different pairs of words (distinct-2)",
    "self_bleu": "self-BLEU (lower is more diverse)",
    "length": "length (tokens)",
}


def diversity(runs: Sequence[ReportedRun]) -> Section:
    """Tabulate metrics of samples, and draw pass@k; online runs have the latter of their held-out prompts."""
    has = [run for run in runs if run.sampled]
    body: list[Html] = [legend(runs)]
    plots: list[Plot | None] = []
    for name in dict.fromkeys(name for run in has for name in run.sampled):
        found = [(run, run.sampled[name]) for run in has if name in run.sampled]
        counts = {f"{summary.num_prompts} prompts, {summary.num_completions} completions" for _, summary in found}
        about = f"{'; '.join(sorted(counts))}."
        names = dict.fromkeys(metric for _, summary in found for metric in summary.metrics)
        rows = [
            [
                _label(metric),
                *(
                    interval(summary.metrics.get(metric), share if metric.startswith("pass@") else fixed)
                    for _, summary in found
                ),
            ]
            for metric in names
        ]
        head = ["", *(run_name(run) for run, _ in found)]
        body += [
            tag("h3", name),
            tag("p", about, attributes={"class": "note"}),
            table(f"Samples of {name}", head, rows),
        ]
        plots.append(pass_plot(f"pass@k of {name}", [(run, summary.metrics, "") for run, summary in found]))
    plots.append(
        pass_plot(
            "pass@k held out",
            [
                (run, _estimates(values), what)
                for run in runs
                for values, what in ((run.before, "before"), (run.after, "after"))
            ],
        )
    )
    grid, pictures = drawn([plot for plot in plots if plot is not None])
    if pictures:
        body.append(grid)
    if not has:
        body.append(missing("Samples are not measured yet:", COMMAND.replace("RUN", path_of(runs[0]))))
    return Section("diversity", TITLE, joined([*body, lacking(runs, has, COMMAND)]), pictures)


def _estimates(values: dict[str, float]) -> dict[str, Estimate]:
    return {name: Estimate(value=value) for name, value in values.items()}


def _label(metric: str) -> str:
    if metric.startswith("divergence/"):
        return f"{divergence_label(metric.removeprefix('divergence/'))} to the reference (nats)"
    return LABELS.get(metric, metric)
