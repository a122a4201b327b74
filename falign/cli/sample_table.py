"""The table at the end of ``falign evaluate samples``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.evaluation.summaries import SampleSummary

__all__ = ["show"]

SHARES = ("pass@", "clipped", "unique")


def show(summary: SampleSummary, folder: Path) -> None:
    """Print each metric with its interval, and beside it what the reference has.

    Args:
        summary: The results.
        folder: Where it lies.
    """
    console, metrics = Terminal(highlight=False), summary.metrics
    title = f"{summary.num_prompts:,} prompts, {summary.num_completions} completions each"
    table = Table("", title=title, title_justify="left")
    table.add_column("policy", justify="right")
    with_reference = any(name.startswith("reference/") for name in metrics)
    if with_reference:
        table.add_column("reference", justify="right")
    for name, metric in metrics.items():
        if name.startswith("reference/"):
            continue
        style = "{:.1%}" if name.startswith(SHARES) else "{:.4g}"
        value, low, high = (style.format(number) for number in (metric.value, metric.low, metric.high))
        cells = [f"{value} ({low} to {high})"]
        if with_reference:
            other = metrics.get(f"reference/{name}")
            cells.append("" if other is None else style.format(other.value))
        table.add_row(escape(name), *cells)
    console.print(table)
    console.print("wrote", escape(str(folder)), soft_wrap=True)
