"""``falign evaluate rewards``: a reward benchmark under all scorers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from falign.cli.options import TrustCode, with_options_named
from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.evaluation.summaries import Estimate, RewardSummary

__all__ = ["rewards"]

MAX_PARTS = 6
"""The most parts of a score in the table."""


@with_options_named
def rewards(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run folder, scored by its own objective, or any model.")
    ],
    benchmark: Annotated[
        str,
        typer.Argument(
            metavar="BENCHMARK",
            help="rewardbench, rewardbench2, rm_bench, judgebench or llmbar; preferences, for a file of pairs or "
            "lists; or your own module:Class.",
        ),
    ],
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="File or folder of the benchmark. Default: from the Hub.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Write results to RUN/evaluation/NAME. Default: the benchmark's name.")
    ] = None,
    subset: Annotated[list[str] | None, typer.Option(help="Only this part of the benchmark; may be repeated.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a folder or the Hub dataset.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Reference for a model. Not for a run, which has its own.")
    ] = None,
    divergence: Annotated[
        str | None, typer.Option(help="Divergence of the implicit reward. Default: reverse_kl. Not for a run.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="β of the implicit reward. Default: 0.1. Not for a run.")] = None,
    reference_free: Annotated[
        bool, typer.Option("--reference-free", help="Score a model without a reference, by its log-probabilities.")
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Maximum tokens of prompt and longest completion together. Default: the run's for preferences, "
            "otherwise the model's limit, at most 4096.",
        ),
    ] = None,
    long_items: Annotated[
        str, typer.Option(help="For longer items: skip leaves them out and counts them; cut, as in training; error.")
    ] = "skip",
    tokens_per_batch: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens per forward pass; fewer need less memory.")
    ] = 4096,
    bad_rows: Annotated[
        str, typer.Option(help="At a bad row: skip leaves it out and counts it, error stops.")
    ] = "skip",
    layout: Annotated[str, typer.Option(help="tree, padded, or auto (trees if the models support them).")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of model and reference. Default: the checkpoint's. Not for a run.")
    ] = None,
    scorers: Annotated[str | None, typer.Option(help="Names of scorers, separated by commas. Default: all.")] = None,
    classifier: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A sequence classifier to add as a scorer.")
    ] = None,
    classifier_text: Annotated[
        str | None,
        typer.Option(
            help="Input of the classifier: chat, joined, pair or completion. Default: chat with a chat template, else "
            "joined."
        ),
    ] = None,
    classifier_label: Annotated[
        str | None, typer.Option(help="Label of the classifier to use, if it has several.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--plain", help="Read plain texts as chat turns, or as they are. Default: as the run did."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the scorer random and of the intervals.")] = 0,
    num_resamples: Annotated[
        int, typer.Option("--resamples", metavar="N", min=1, help="Bootstrap resamples for the intervals.")
    ] = 1000,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results; required for a model.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over, and replace existing scores.")] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use only the first N items.")] = None,
    trust_code: TrustCode = False,
) -> None:
    """Score a benchmark under all rewards that a model defines. If stopped, continues when run again."""
    from falign.evaluation.reward_evaluation import evaluate_rewards

    summary = evaluate_rewards(
        model,
        benchmark,
        file,
        name=name,
        subset=subset or (),
        split=split,
        reference=reference,
        divergence=divergence,
        beta=beta,
        reference_free=reference_free,
        max_length=max_length,
        long_items=long_items,
        tokens_per_batch=tokens_per_batch,
        bad_rows=bad_rows,
        layout=layout,
        dtype=dtype,
        scorers=None if scorers is None else [*filter(None, scorers.replace(",", " ").split())],
        classifier=classifier,
        classifier_text=classifier_text,
        classifier_label=classifier_label,
        chat=chat,
        seed=seed,
        num_resamples=num_resamples,
        out=out,
        overwrite=overwrite,
        limit=limit,
        trust_code=trust_code,
    )
    _show(summary, out or Path(model) / "evaluation" / summary.name)


def _show(summary: RewardSummary, folder: Path) -> None:
    """Print one column per scorer: its score, interval, parts and calibration.

    Args:
        summary: The results.
        folder: The folder that holds them.
    """
    console = Terminal(highlight=False)
    scorers = summary.scorers
    whole, *parts = _headline(next(iter(scorers.values())).scores, summary.subsets)
    title = f"{summary.benchmark}, {summary.num_items:,} items, in %"
    table = Table(
        Column(no_wrap=True),
        title=escape(title),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in scorers:
        table.add_column(
            name.replace("_", "\n"), justify="right", vertical="bottom"
        )  # one word per line: seven scorers fit 80 columns
    table.add_row(whole, *(f"[bold]{_percent(each.scores[whole].value)}[/]" for each in scorers.values()))
    table.add_row("95%", *(_interval(each.scores[whole]) for each in scorers.values()))
    for part in parts:
        table.add_row(part, *(_percent(each.scores[part].value) for each in scorers.values()))
    if any(each.calibration for each in scorers.values()):
        errors = (each.calibration for each in scorers.values())
        table.add_row("ECE", *(_percent(error.ece.value) if error else "" for error in errors))
    console.print(table)
    if missing := summary.missing_subsets:
        console.print(
            f"the score needs all subsets ({', '.join(missing)} missing), so the first row is the plain accuracy."
        )
    console.print(f"results {escape(str(folder))}", soft_wrap=True)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _interval(score: Estimate) -> str:
    return "" if score.low is None or score.high is None else f"{100 * score.low:.0f}–{100 * score.high:.0f}"


def _headline(scores: Mapping[str, Any], subsets: Mapping[str, int]) -> list[str]:
    """Return the names of the table's rows: the score, or without one the plain accuracy; then its parts.

    Args:
        scores: Scores by name; details of a part are named ``part/detail``, and are left out.
        subsets: Number of items by subset. If there are too many parts, those that are subsets are left out.
    """
    whole = "score" if "score" in scores else "accuracy"
    parts = [name for name in scores if name not in ("score", "accuracy") and "/" not in name]
    if len(parts) > MAX_PARTS:
        parts = [name for name in parts if name not in subsets]
    return [whole, *parts[:MAX_PARTS]]
