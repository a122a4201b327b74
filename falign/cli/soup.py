"""``falign soup``: average models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand
from typing_extensions import override

from falign.cli.options import with_options_named
from falign.terminal import Terminal

__all__ = ["SoupCommand", "soup"]


class SoupCommand(TyperCommand):
    """Accepts ``--weights 0.5 0.5``, which click knows only as ``--weights 0.5 --weights 0.5``."""

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        taking = False
        for arg in args:
            if taking and _is_number(arg):
                if spread[-1] != "--weights":
                    spread.append("--weights")
            else:
                taking = arg == "--weights"
            spread.append(arg)
        return super().parse_args(ctx, spread)


@with_options_named
def soup(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C ...]", help="Adapters of one base, whole checkpoints, or the runs that trained them."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Target folder.")],
    weights: Annotated[
        list[float] | None, typer.Option("--weights", help="One weight for each, with sum 1. Default: equal weights.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of averaged checkpoints; auto: that of the first.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the target folder.")] = False,
) -> None:
    """Average adapters of one base (exactly) or whole checkpoints, for use as a reference (SALSA) or a model."""
    from falign.runs.export import soup as average

    with Terminal(stderr=True).status(f"averaging {escape(', '.join(paths))}"):
        record = average(paths, out, weights=weights or None, dtype=dtype, overwrite=overwrite)
    console = Terminal()
    console.print("wrote", Text(str(out), style="bold"))
    table = Table(record.kind, "weight", "sha256")
    for member in record.members:
        table.add_row(escape(member.path), f"{member.weight:.4g}", member.sha256[:12])
    console.print(table)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
