"""``falign score``."""

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
        str, typer.Argument(metavar="RUN|MODEL", help="A run folder, scored by its own objective; or any model.")
    ],
    file: Annotated[str, typer.Argument(metavar="FILE", help="Pairs, lists or single completions, as train reads.")],
    out: Annotated[Path, typer.Option("--out", help="The scores: .jsonl or .parquet.")],
    reference: Annotated[
        str | None, typer.Option(help="What a model is compared with; refused for a run, which has its own.")
    ] = None,
    divergence: Annotated[
        str | None, typer.Option(help="f of a model's implicit reward, reverse_kl if left out; refused for a run.")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="β of a model's implicit reward, 0.1 if left out; refused for a run.")
    ] = None,
    format: Annotated[str, typer.Option(help="Layout of the file; auto tells it from the columns.")] = "auto",
    columns: Annotated[str, typer.Option(help="What the file calls falign's columns: '{prompt: question}'.")] = "{}",
    split: Annotated[str, typer.Option()] = "train",
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--plain", help="Whether the file's plain texts are turns; a run's own if left out."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="The window, prompt and completion together; a run's own, else 1024.")
    ] = None,
    tokens_per_batch: Annotated[int, typer.Option(min=2, help="Tokens scored at once: memory against speed.")] = 4096,
    bad_rows: Annotated[str, typer.Option(help="error stops at a row that cannot be used, skip counts it.")] = "error",
    layout: Annotated[str, typer.Option(help="tree, padded, or auto: trees where the models read them.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Of both models, the checkpoint's if left out; refused for a run.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing scores, complete or not.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Write log-probs per token, log-ratios and implicit rewards; a stopped call continues if repeated."""
    from falign.cli.data import column_mapping
    from falign.evaluation.score_run import score as write

    totals = write(
        model,
        {"path": file, "split": split, "format": format, "columns": column_mapping(columns), "chat": chat},
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
        table.add_row("of them scored by an earlier call", f"{totals.resumed:,}")
    table.add_row("tokens", f"{totals.tokens:,}")
    table.add_row("mean log-ratio", f"{totals.mean_log_ratio:+.4f}")
    table.add_row("mean implicit reward", f"{totals.mean_implicit_reward:+.4f}")
    if totals.reward_accuracy is not None:
        table.add_row("reward accuracy", f"{totals.reward_accuracy:.1%} of {totals.pairs:,} pairs")
    Terminal(highlight=False).print(table)
