"""The table at the end of ``falign evaluate rewards``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["headline", "show"]

MOST_COLUMNS = 6


def show(summary: Mapping[str, Any], folder: Path) -> None:
    """Print one row per scorer: the score with its interval, the parts that it is made of, and calibration.

    Args:
        summary: As in ``summary.json``.
        folder: Where it lies.
    """
    console = Console(highlight=False)
    scorers = summary["scorers"]
    names = headline(next(iter(scorers.values()))["scores"], summary["subsets"])
    calibrated = any(scorer["calibration"] for scorer in scorers.values())
    title = f"{summary['benchmark']}, {summary['num_items']:,} items"
    table = Table("scorer", title=escape(title), title_justify="left")
    for name in [*names, *(["ECE"] if calibrated else [])]:
        table.add_column(name, justify="right")
    for scorer, values in scorers.items():
        scores = values["scores"]
        first, *others = (scores[name] for name in names)
        cells = [f"{first['value']:.1%} ({first['low']:.1%}–{first['high']:.1%})"]
        cells += [f"{score['value']:.1%}" for score in others]
        if calibrated:
            cells.append(f"{values['calibration']['ece']:.3f}" if values["calibration"] else "")
        table.add_row(scorer, *cells)
    console.print(table)
    if missing := summary["missing_subsets"]:
        console.print(f"no score: without {', '.join(missing)} there is none; the first column is the plain mean.")
    console.print(f"results {escape(str(folder))}", soft_wrap=True)


def headline(scores: Mapping[str, Any], subsets: Mapping[str, int]) -> list[str]:
    """Return what a table has room for: the score, or the plain mean where there is none, and the parts.

    Args:
        scores: By name, a part's details as ``part/detail``.
        subsets: Numbers of items by name.
    """
    whole = "score" if "score" in scores else "accuracy"
    parts = [name for name in scores if name not in ("score", "accuracy") and "/" not in name]
    if len(parts) > MOST_COLUMNS:
        parts = [name for name in parts if name not in subsets]
    return [whole, *parts[:MOST_COLUMNS]]
