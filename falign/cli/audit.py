"""``falign audit``: which divergence's gradient a loss has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from falign.cli.options import with_options_named
from falign.errors import ConfigError
from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.audit import AuditResult

__all__ = ["audit"]

SHORT_LEVELS = {
    "sequence": "whole",
    "token": "by token",
    "token_returns": "returns",
    "token_reference": "ref. prefixes",
    "token_old": "old prefixes",
    "token_mean": "mean token",
}
OTHER_DIVERGENCE = 1
"""Exit status if the loss does not have the gradient of the divergence that was named."""


@with_options_named
def audit(
    loss: Annotated[
        str | None, typer.Argument(metavar="[LOSS]", help="module:name of a loss, or a known one (--list).")
    ] = None,
    divergence: Annotated[
        str | None,
        typer.Option("--divergence", metavar="NAME", help="The divergence it is meant for; another is exit status 1."),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option("--samples", metavar="SOURCE", help="policy, reference, old or pairs. Default: policy."),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option("--level", metavar="LEVEL", help="token: the loss is given tokens; sequence: sums."),
    ] = None,
    use: Annotated[
        str | None,
        typer.Option("--use", metavar="USE", help="loss: it is differentiated; reward: it is a penalty in the reward."),
    ] = None,
    credit: Annotated[
        str | None,
        typer.Option("--credit", metavar="CREDIT", help="Of a reward per token: returns, or fixed_prefix for its own."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="NAME", help="The reference to compare with, such as teacher or old."),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also plot the cosines.")] = None,
    list_known: Annotated[bool, typer.Option("--list", help="List the known losses.")] = False,
) -> None:
    """Tell which divergence's gradient a loss has: exactly, by enumerating a small world."""
    console = Terminal(highlight=False)
    if list_known:
        _list_known(console)
        return
    if loss is None:
        raise ConfigError("falign audit needs a loss: module:name of a function or objective, or one of --list.")
    from falign.audit import audit as run_audit
    from falign.runs.named_code import import_from

    import_from(Path.cwd())

    with console.status("enumerating"):
        result = run_audit(
            loss,
            divergence,
            samples=samples,
            level=level,
            use=use,
            credit=credit,
            reference=reference,
        )
    if result.table:
        _show(result, console)
    console.print(str(result), markup=False, soft_wrap=True)
    if plot is not None:
        console.print(f"wrote [bold]{escape(str(result.plot(plot)))}[/]")
    if divergence is not None and not result.passed:
        raise typer.Exit(OTHER_DIVERGENCE)


def _list_known(console: Terminal) -> None:
    from falign.audit import CASES

    about = Column("is", overflow="fold")
    table = Table(Column("loss", no_wrap=True), about, "meant for", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, case in CASES.items():
        table.add_row(name, escape(case.about), case.claimed or "–")
    console.print(table)


def _show(result: AuditResult, console: Terminal) -> None:
    from falign.audit.result import drawn_cosine

    best = result.best
    assert best is not None
    levels = list(dict.fromkeys(row.level for row in result.table))
    several = len({row.reference for row in result.table}) > 1
    table = Table(
        Column("divergence", no_wrap=True),
        *(Column(SHORT_LEVELS[level], justify="right") for level in levels),
        Column("ratio", justify="right"),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"cosine with the true gradient{f' to {best.reference}' if several else ''}",
    )
    rows = [row for row in result.table if row.reference == best.reference]
    for name in dict.fromkeys(row.divergence for row in rows):
        own = {row.level: row for row in rows if row.divergence == name}
        cosines = [own.get(level) for level in levels]
        cells = [
            ""
            if row is None
            else f"[bold green]{drawn_cosine(row.cosine)}[/]"
            if row.exact
            else drawn_cosine(row.cosine)
            for row in cosines
        ]
        exact = next((row for row in own.values() if row.exact and not math.isnan(row.ratio)), None)
        table.add_row(name, *cells, f"{exact.ratio:.4g}" if exact else "")
    console.print(table)
