"""``falign evaluate rewards``."""

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

MOST_COLUMNS = 6


@with_options_named
def rewards(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run folder, scored by its own objective; or any model.")
    ],
    benchmark: Annotated[
        str,
        typer.Argument(
            metavar="BENCHMARK",
            help="rewardbench, rewardbench2, rm_bench, judgebench, llmbar; preferences: any file of pairs or lists; or "
            "module:Class of your own.",
        ),
    ],
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="Its file or folder; from the Hub if left out.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Results go to RUN/evaluation/NAME; the benchmark's name if left out.")
    ] = None,
    subset: Annotated[
        list[str] | None, typer.Option(help="Only this part of the benchmark; may be given several times.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of the Hub's data set or a folder.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="What a model is compared with; refused for a run, which has its own.")
    ] = None,
    divergence: Annotated[
        str | None, typer.Option(help="f of a model's implicit reward, reverse_kl if left out; refused for a run.")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="β of a model's implicit reward, 0.1 if left out; refused for a run.")
    ] = None,
    reference_free: Annotated[
        bool, typer.Option("--reference-free", help="Score a model without reference, by its log-probabilities.")
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="The window, prompt and longest completion together. If left out, the run's own for preferences, else "
            "what the model allows, at most 4096.",
        ),
    ] = None,
    long_items: Annotated[
        str, typer.Option(help="What is longer: skip leaves it out and counts it, cut as in training, error.")
    ] = "skip",
    tokens_per_batch: Annotated[int, typer.Option(min=2, help="Tokens scored at once: memory against speed.")] = 4096,
    bad_rows: Annotated[
        str, typer.Option(help="skip leaves out rows that cannot be used and counts them, error stops at one.")
    ] = "skip",
    layout: Annotated[str, typer.Option(help="tree, padded, or auto: trees where the models read them.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Of both models, the checkpoint's if left out; refused for a run.")
    ] = None,
    scorers: Annotated[str | None, typer.Option(help="Some of them, separated by commas; all if left out.")] = None,
    classifier: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A sequence classifier, which becomes another scorer.")
    ] = None,
    classifier_text: Annotated[
        str | None, typer.Option(help="What it reads: chat, joined, pair or completion; chat where it has a template.")
    ] = None,
    classifier_label: Annotated[str | None, typer.Option(help="Name of its label, where it has several.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--plain", help="Whether a file's plain texts are turns; as the run's were.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the scorer random and of the intervals.")] = 0,
    num_resamples: Annotated[
        int, typer.Option("--resamples", min=1, help="Of the bootstrap that the intervals come from.")
    ] = 1000,
    out: Annotated[Path | None, typer.Option("--out", help="A folder for the results, needed for a model.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing scores, complete or not.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many items, the first ones.")] = None,
    trust_code: TrustCode = False,
) -> None:
    """Score a benchmark under all rewards that a model defines; a stopped call continues if repeated."""
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
    """Print a column for each scorer: the score, its interval, the parts that it is made of, and calibration.

    Args:
        summary: The results.
        folder: Where it lies.
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
        table.add_column(name.replace("_", "\n"), justify="right", vertical="bottom")  # seven of them fit 80 columns
    table.add_row(whole, *(f"[bold]{_percent(each.scores[whole].value)}[/]" for each in scorers.values()))
    table.add_row("95%", *(_interval(each.scores[whole]) for each in scorers.values()))
    for part in parts:
        table.add_row(part, *(_percent(each.scores[part].value) for each in scorers.values()))
    if any(each.calibration for each in scorers.values()):
        errors = (each.calibration for each in scorers.values())
        table.add_row("ECE", *(_percent(error.ece.value) if error else "" for error in errors))
    console.print(table)
    if missing := summary.missing_subsets:
        console.print(f"the benchmark has no score without {', '.join(missing)}; the first row is the plain mean.")
    console.print(f"results {escape(str(folder))}", soft_wrap=True)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _interval(score: Estimate) -> str:
    return "" if score.low is None or score.high is None else f"{100 * score.low:.0f}–{100 * score.high:.0f}"


def _headline(scores: Mapping[str, Any], subsets: Mapping[str, int]) -> list[str]:
    """Return the rows of a table: the score (or the plain mean without one) and its parts.

    Args:
        scores: By name, a part's details as ``part/detail``.
        subsets: Numbers of items by name.
    """
    whole = "score" if "score" in scores else "accuracy"
    parts = [name for name in scores if name not in ("score", "accuracy") and "/" not in name]
    if len(parts) > MOST_COLUMNS:
        parts = [name for name in parts if name not in subsets]
    return [whole, *parts[:MOST_COLUMNS]]
