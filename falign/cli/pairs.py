"""``falign pairs``: preference data from files of samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from falign.cli.options import CommandTerminal, TrustCode, with_options_named
from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.evaluation.pairs_run import PairsSummary

__all__ = ["pairs"]


@with_options_named
def pairs(
    samples: Annotated[
        str, typer.Argument(metavar="SAMPLES", help="A file of `falign sample --out`, or of prompts with completions.")
    ],
    rejected: Annotated[
        str | None,
        typer.Argument(metavar="[REJECTED]", help="A second file, whose completions are rejected: delta learning."),
    ] = None,
    *,
    out: Annotated[Path, typer.Option("--out", help="Output file: .jsonl.")],
    rewards: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|RUN",
            help="Rewards: a file of `falign score` (may be repeated), a YAML file that lists them, or a run. Default: "
            "the column of --reward-column.",
        ),
    ] = None,
    reward_column: Annotated[str, typer.Option(metavar="NAME", help="Column with the reward.")] = "reward",
    layout: Annotated[
        str,
        typer.Option(
            help="pairs: best and worst of each prompt, or the i-th of both files; all_pairs; ranked: lists with "
            "scores; best: the best of n."
        ),
    ] = "pairs",
    min_margin: Annotated[
        float, typer.Option(metavar="M", min=0.0, help="Smaller differences in reward are ties.")
    ] = 0.0,
    keep_truncated: Annotated[
        bool, typer.Option("--keep-truncated", help="Keep completions that hit the maximum length.")
    ] = False,
    allow_unmatched: Annotated[
        bool,
        typer.Option("--allow-unmatched", help="Leave out and count what only one of two files has."),
    ] = False,
    bad_rows: Annotated[
        str, typer.Option(help="At a bad row: error stops, skip leaves it out and counts it.")
    ] = "error",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Make pairs, ranked lists or best-of-n answers of samples, by rewards, or of one model's over another's."""
    from falign.evaluation.pairs_run import pairs as write

    console = CommandTerminal(stderr=True, highlight=False, soft_wrap=True)
    summary = write(
        samples,
        rejected,
        out=out,
        rewards=rewards or None,
        reward_column=reward_column,
        layout=layout,
        min_margin=min_margin,
        keep_truncated=keep_truncated,
        allow_unmatched=allow_unmatched,
        bad_rows=bad_rows,
        overwrite=overwrite,
        trust_code=trust_code,
        console=console,
    )
    _show(summary, out, console)


def _show(summary: PairsSummary, out: Path, console: Terminal) -> None:
    from falign.data.pairing import LEFT_OUT

    table = Table("", "", "first", title=escape(str(out)), title_justify="left", show_header=bool(summary.left_out))
    table.add_row("rows", f"{summary.rows:,}", "")
    table.add_row("prompts", f"{summary.prompts:,}", "")
    table.add_row("prompts in the rows", f"{summary.prompts_used:,}", "")
    table.add_row("completions", f"{summary.completions:,}", "")
    if summary.mean_margin is not None:
        table.add_row("mean margin", f"{summary.mean_margin:+.4f}", "")
    for reason, count in summary.left_out.items():
        table.add_row(f"left out: {LEFT_OUT[reason]}", f"{count:,}", escape(summary.first[reason]))
    if summary.bad_rows:
        table.add_row("bad rows", f"{summary.bad_rows:,}", "")
    Terminal(highlight=False).print(table)
    for message in summary.messages:
        console.print(f"bad row: {message}", style="yellow", markup=False)
