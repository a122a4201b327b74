"""``falign evaluate frontier``: reward against divergence, of what ``falign evaluate samples`` has measured."""

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
        list[str], typer.Argument(metavar="RUN ...", help="Run folders, or folders of `falign evaluate samples`.")
    ],
    out: Annotated[Path, typer.Option("--out", help="A picture (.png, .svg, .pdf), or .json.")],
    name: Annotated[
        str | None, typer.Option(help="Which evaluation of the runs; all that sampled, if left out.")
    ] = None,
    divergence: Annotated[str, typer.Option(help="On the horizontal axis.")] = "reverse_kl",
    trust_code: TrustCode = False,
) -> None:
    """Draw reward against divergence, beside the best of n and what each divergence ideally allows."""
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
