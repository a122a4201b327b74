"""``falign evaluate frontier``: reward against divergence, from results of ``falign evaluate samples``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from falign.cli.options import TrustCode, with_options_named
from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.evaluation.summaries import Frontier

__all__ = ["frontier"]


@with_options_named
def frontier(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN ...", help="Run folders, or output folders of `falign evaluate samples`."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Output file: an image (.png, .svg, .pdf) or .json.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the evaluation in each run. Default: all with samples.")
    ] = None,
    divergence: Annotated[str, typer.Option(help="Divergence on the horizontal axis.")] = "reverse_kl",
    trust_code: TrustCode = False,
) -> None:
    """Plot reward against divergence, with best-of-n and the optimum of each divergence for comparison."""
    from falign.evaluation.frontier_run import evaluate_frontier

    _show(evaluate_frontier(runs, out, name=name, divergence=divergence, trust_code=trust_code), out)


def _show(data: Frontier, out: Path) -> None:
    console = Terminal(highlight=False)
    table = Table("", f"{data.divergence}, nats", "reward", title="reward against divergence", title_justify="left")
    for point in data.points:
        table.add_row(escape(point.label), f"{point.divergence:.4g}", f"{point.reward:.4g}")
    for each in data.best_of_n:
        table.add_row(f"best of {each.n}", f"≤ {each.divergence:.4g}", f"{each.reward:.4g}", style="dim")
    console.print(table)
    console.print("wrote", escape(str(out)), soft_wrap=True)
