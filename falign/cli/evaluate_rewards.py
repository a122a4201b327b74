"""``falign evaluate rewards``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from falign.cli.options import TrustCode, with_options_named

__all__ = ["rewards"]


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
    """Score a benchmark under all rewards that a model defines; a stopped call goes on if repeated."""
    from falign.cli.reward_table import show
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
    show(summary, out or Path(model) / "evaluation" / summary.name)
