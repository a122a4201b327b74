"""``falign score``: write the scores of completions to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from falign.cli.options import TrustCode, with_options_named
from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.evaluation import ScoreTotals

__all__ = ["score"]


@with_options_named
def score(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run folder, scored by its own objective, or any model.")
    ],
    file: Annotated[str, typer.Argument(metavar="FILE", help="Preference pairs, lists or single completions.")],
    out: Annotated[Path, typer.Option("--out", help="Output file: .jsonl or .parquet.")],
    reference: Annotated[
        str | None, typer.Option(help="Reference for a model. Not for a run, which has its own.")
    ] = None,
    divergence: Annotated[
        str | None, typer.Option(help="Divergence of the implicit reward. Default: reverse_kl. Not for a run.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="β of the implicit reward. Default: 0.1. Not for a run.")] = None,
    format: Annotated[str, typer.Option(help="Format of the rows; auto detects it from the columns.")] = "auto",
    columns: Annotated[str, typer.Option(help="The file's name for each column: '{prompt: question}'.")] = "{}",
    split: Annotated[str, typer.Option(help="Split of a folder or a Hub dataset.")] = "train",
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--plain", help="Read plain texts as chat turns, or as they are. Default: as the run did."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="A column to ignore although it looks like part of the prompt; may be repeated."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="Maximum tokens of prompt and completion together. Default: the run's, or 1024."
        ),
    ] = None,
    tokens_per_batch: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens per forward pass; fewer need less memory.")
    ] = 4096,
    bad_rows: Annotated[
        str, typer.Option(help="At a bad row: error stops, skip leaves it out and counts it.")
    ] = "error",
    layout: Annotated[str, typer.Option(help="tree, padded, or auto (trees if the models support them).")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of model and reference. Default: the checkpoint's. Not for a run.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over, and replace existing scores.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Score completions: token log-probs, log-ratios, implicit rewards. If stopped, continues when run again."""
    from falign.cli.data import column_mapping
    from falign.evaluation.score_run import score as write

    totals = write(
        model,
        {"path": file, "split": split, "format": format, "columns": column_mapping(columns), "chat": chat}
        | {"ignore": list(ignore or ())},
        out,
        reference=reference,
        divergence=divergence,
        beta=beta,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        bad_rows=bad_rows,
        layout=layout,
        dtype=dtype,
        overwrite=overwrite,
        trust_code=trust_code,
    )
    _show(totals, out)


def _show(totals: ScoreTotals, out: Path) -> None:
    table = Table("", "", title=escape(str(out)), title_justify="left", show_header=False)
    table.add_row("completions", f"{totals.completions:,}")
    if totals.resumed:
        table.add_row("scored by an earlier call", f"{totals.resumed:,}")
    table.add_row("tokens", f"{totals.tokens:,}")
    table.add_row("mean log-ratio", f"{totals.mean_log_ratio:+.4f}")
    table.add_row("mean implicit reward", f"{totals.mean_implicit_reward:+.4f}")
    if totals.reward_accuracy is not None:
        table.add_row("reward accuracy", f"{totals.reward_accuracy:.1%} of {totals.pairs:,} pairs")
    Terminal(highlight=False).print(table)
