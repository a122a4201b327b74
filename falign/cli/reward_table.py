"""The table at the end of ``falign evaluate rewards``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.evaluation.summaries import Estimate, RewardSummary

__all__ = ["headline", "show"]

MOST_COLUMNS = 6


def show(summary: RewardSummary, folder: Path) -> None:
    """Print a column for each scorer: the score, its interval, the parts that it is made of, and calibration.

    Args:
        summary: The results.
        folder: Where it lies.
    """
    console = Terminal(highlight=False)
    scorers = summary.scorers
    whole, *parts = headline(next(iter(scorers.values())).scores, summary.subsets)
    title = f"{summary.benchmark}, {summary.num_items:,} items, in %"
    table = Table(
        Column(no_wrap=True),
        title=escape(title),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in scorers:
        table.add_column(name.replace("_", "\n"), justify="right", vertical="bottom")  # seven of them fit 80 columns
    table.add_row(whole, *(f"[bold]{_percent(each.scores[whole].value)}[/]" for each in scorers.values()))
    table.add_row("95%", *(_interval(each.scores[whole]) for each in scorers.values()))
    for part in parts:
        table.add_row(part, *(_percent(each.scores[part].value) for each in scorers.values()))
    if any(each.calibration for each in scorers.values()):
        errors = (each.calibration for each in scorers.values())
        table.add_row("ECE", *(_percent(error.ece.value) if error else "" for error in errors))
    console.print(table)
    if missing := summary.missing_subsets:
        console.print(f"the benchmark has no score without {', '.join(missing)}; the first row is the plain mean.")
    console.print(f"results {escape(str(folder))}", soft_wrap=True)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _interval(score: Estimate) -> str:
    return "" if score.low is None or score.high is None else f"{100 * score.low:.0f}–{100 * score.high:.0f}"


def headline(scores: Mapping[str, Any], subsets: Mapping[str, int]) -> list[str]:
    """Return the rows of a table: the score (or the plain mean without one) and its parts.

    Args:
        scores: By name, a part's details as ``part/detail``.
        subsets: Numbers of items by name.
    """
    whole = "score" if "score" in scores else "accuracy"
    parts = [name for name in scores if name not in ("score", "accuracy") and "/" not in name]
    if len(parts) > MOST_COLUMNS:
        parts = [name for name in parts if name not in subsets]
    return [whole, *parts[:MOST_COLUMNS]]
