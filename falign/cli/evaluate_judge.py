"""``falign evaluate judge``: a model's answers to a benchmark, judged by an LLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from falign.cli.options import CommandTerminal, TrustCode, with_options_named
from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.evaluation.summaries import JudgeSummary

__all__ = ["judge"]

ANSWERS = "Answers"
ON_A_SCALE = ("score", "length")
"""Beginnings of the names of metrics that are not shares."""


@with_options_named
def judge(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL|ANSWERS", help="A run folder or any model, which answers; or a file of answers."
        ),
    ],
    benchmark: Annotated[
        str, typer.Argument(metavar="BENCHMARK", help="mt_bench, arena_hard, alpaca_eval, or your own module:Class.")
    ],
    questions: Annotated[Path, typer.Argument(metavar="QUESTIONS", help="The benchmark's file of questions.")],
    judge: Annotated[Path, typer.Option(metavar="FILE", help="A YAML file with url, model ... of the judge.")],
    mode: Annotated[
        str | None,
        typer.Option(
            help="single scores from 1 to 10; pairwise compares. Default: single for mt_bench, else pairwise."
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Answers to compare with. Default: the reference outputs of an AlpacaEval file."),
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="Reference answers for the judge. Default: those of the questions.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="A YAML file with the judge's messages. Default: built in.")
    ] = None,
    engine: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file with a section rollout.engine, to sample answers there. Default: in this process.",
            rich_help_panel=ANSWERS,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Maximum tokens per answer.", rich_help_panel=ANSWERS)
    ] = 1024,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            min=0.0,
            help="Default: the benchmark's, for mt_bench by category, else 0.",
            rich_help_panel=ANSWERS,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of answers and intervals.")] = 0,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use only the first N questions.")] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Name of the model in its answers. Default: that of its folder.", rich_help_panel=ANSWERS),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of a model; a run has its own.", rich_help_panel=ANSWERS)] = "auto",
    name: Annotated[
        str | None, typer.Option(help="Write results to RUN/evaluation/NAME. Default: BENCHMARK-MODE.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results; required for a model.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over, and replace existing results.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Answer a benchmark's questions, and let an LLM judge. If stopped, continues when run again."""
    from falign.evaluation.judged.evaluation import evaluate_judge
    from falign.evaluation.judged.options import judged_folder

    summary = evaluate_judge(
        model,
        benchmark,
        questions,
        judge=judge,
        mode=mode,
        baseline=baseline,
        references=references,
        template=template,
        engine=engine,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        limit=limit,
        label=label,
        dtype=dtype,
        name=name,
        out=out,
        overwrite=overwrite,
        trust_code=trust_code,
        console=CommandTerminal(stderr=True, highlight=False, soft_wrap=True),
    )
    _show(summary, judged_folder(model, summary.benchmark, mode=summary.mode, name=name, out=out))


def _show(summary: JudgeSummary, folder: Path) -> None:
    """Print each metric with its interval, then failures and cost."""
    console = Terminal(highlight=False)
    against = "" if summary.baseline is None else f" against {summary.baseline}"
    title = f"{summary.benchmark}: {summary.label}{against}, {summary.num_questions:,} questions, by {summary.judge}"
    console.print(escape(title), soft_wrap=True)
    table = Table(Column(overflow="fold"), Column(justify="right"), show_header=False)
    for name, metric in summary.metrics.items():
        style = "{:.4g}" if name.startswith(ON_A_SCALE) else "{:.1%}"
        shown = "" if metric.value is None else style.format(metric.value)
        if metric.low is not None and metric.high is not None:
            shown += f" ({style.format(metric.low)} to {style.format(metric.high)})"
        table.add_row(escape(name), shown)
    console.print(table)
    if summary.failures:
        console.print(f"{summary.failures} of {summary.num_judgments} answers have no verdict, and are not counted")
    usage = summary.usage
    cost = "" if usage.get("cost") is None else f", cost {usage['cost']:.4f}"
    tokens = f"{usage['prompt_tokens']:,} prompt tokens and {usage['completion_tokens']:,} completion tokens"
    console.print(f"judge: {usage['requests']:,} requests, {usage['cached']:,} from the cache; {tokens}{cost}")
    console.print("wrote", escape(str(folder)), soft_wrap=True)
