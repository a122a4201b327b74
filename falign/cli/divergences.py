"""``falign divergences``: a table of the families, and a plot of f and f′."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from falign.durable import writing
from falign.errors import ConfigError
from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.divergences import Divergence

__all__ = ["divergences", "plot_divergences"]

EXAMPLES = {"alpha": "alpha(0.5)", "generalized_js": "generalized_js(0.3)"}


def divergences(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME ...]", help="Divergences to show. Default: all families.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Also plot f and f′ to this file.")
    ] = None,
) -> None:
    """Show divergences: the limits of f′, f″(1), whether f-DPO can use them, and the dual."""
    from falign.divergences import get
    from falign.divergences import names as all_names

    try:
        chosen = [get(name) for name in names or [EXAMPLES.get(name, name) for name in all_names()]]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if plot is not None:
        plot_divergences(chosen, plot)
    # No frame: the longest name stands twice in a row, and the table must fit 80 columns.
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
        console.print("u = π/π_ref. `falign divergences NAME ...` also prints formulas and sources.")
    if plot is not None:
        console.print(f"wrote [bold]{plot}[/]")


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else f"{value:.4g}".replace("-", "−")


def plot_divergences(divergences: Sequence[Divergence], path: Path) -> None:
    """Plot f and f′ over the density ratio u on a logarithmic axis.

    Args:
        divergences: One line each.
        path: The image file; its suffix (.png, .svg, .pdf) selects the format.

    Raises:
        ConfigError: The suffix is no image format, or the folder does not exist.
    """
    import matplotlib
    import torch

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    kinds = sorted(figure.canvas.get_supported_filetypes())
    kind = path.suffix.lstrip(".").lower()
    if kind not in kinds or not path.absolute().parent.is_dir():
        plt.close(figure)
        raise ConfigError(
            f"--plot {path}: give a file in an existing folder with one of the suffixes {', '.join(kinds)}."
        )
    log_u = torch.linspace(-4, 4, 801, dtype=torch.float64)
    colors = plt.get_cmap("turbo")(torch.linspace(0.05, 0.95, max(len(divergences), 2)).numpy())
    styles = ("-", "--", "-.", ":")
    for i, divergence in enumerate(divergences):
        look = {"label": divergence.name, "color": colors[i], "linestyle": styles[i % 4], "linewidth": 1.6}
        left.plot(log_u.exp(), divergence.f(log_u), **look)
        right.plot(log_u.exp(), divergence.f_prime(log_u), **look)
    for axis, title, limits in (
        (left, "f(u): cost of a ratio", (0, 4)),
        (right, "f′(u): implicit reward over β", (-5, 5)),
    ):
        axis.set(xscale="log", ylim=limits, xlabel="u = π/π_ref")
        axis.set_title(title, loc="left", fontsize=11)
        axis.axvline(1, color="0.6", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    right.axhline(0, color="0.6", linewidth=0.8)
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=kind)
    plt.close(figure)
