"""``falign divergences``."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from falign.errors import ConfigError
from falign.terminal import Terminal

__all__ = ["divergences"]

EXAMPLES = {"alpha": "alpha(0.5)", "generalized_js": "generalized_js(0.3)"}


def divergences(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME ...]", help="All families when left out.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw f and f′ of those named.")] = None,
) -> None:
    """Print the table of divergences: limits of f′, local strength, and whether f-DPO can use them."""
    from falign.divergences import get
    from falign.divergences import names as all_names

    try:
        chosen = [get(name) for name in names or [EXAMPLES.get(name, name) for name in all_names()]]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if plot is not None:
        from falign.cli.divergence_plot import plot_divergences

        plot_divergences(chosen, plot)
    # No frame, so that 80 columns hold the longest name twice.
    name, dual = Column("name", no_wrap=True), Column("dual", no_wrap=True)
    table = Table(name, "f′(0⁺)", "f′(∞)", "f″(1)", "f-DPO", dual, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for divergence in chosen:
        table.add_row(
            divergence.name,
            _number(divergence.f_prime_at_zero),
            _number(divergence.f_prime_at_infinity),
            _number(divergence.second_derivative_at_one),
            "yes" if divergence.has_barrier else "[red]no barrier[/]",
            divergence.dual().name,
        )
    console = Terminal(highlight=False)
    console.print(table)
    if names:
        for divergence in chosen:
            console.print(f"\n{divergence.name}", style="bold")
            console.print(inspect.getdoc(divergence) or "", markup=False)
    else:
        console.print("`falign divergences NAME ...` prints formulas and sources; u = π/π_ref.")
    if plot is not None:
        console.print(f"wrote [bold]{plot}[/]")


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else f"{value:.4g}".replace("-", "−")
