"""Sections, and the line in place of one without data."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from falign.report.drawing import Picture, Plot, render
from falign.report.runs import ReportedRun
from falign.report.tables import Html, tag

__all__ = ["Section", "drawn", "lacking", "missing", "path_of", "sampling_command"]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: Its anchor.
        title: Its heading.
        body: Its markup.
        pictures: The plots that are also PNG files.
    """

    id: str
    title: str
    body: Html
    pictures: tuple[Picture, ...] = ()


def path_of(run: ReportedRun) -> str:
    """Return the folder of a run as a word of a command line."""
    return shlex.quote(str(run.folder.path))


def missing(text: str, *commands: str) -> Html:
    """Return one line on missing content, with the commands that fill it."""
    parts = [part for command in commands for part in (" ", tag("code", command))]
    return tag("p", text, *parts, attributes={"class": "missing"})


def sampling_command(run: ReportedRun) -> str:
    """Return the command that samples a run; a run that was trained without rewards needs some for that."""
    rewards = "" if run.run_file.get("rewards") else " --rewards REWARDS.yaml"
    return f"falign evaluate samples {path_of(run)}{rewards}"


def lacking(runs: Sequence[ReportedRun], has: Sequence[ReportedRun], command: Callable[[ReportedRun], str]) -> Html:
    """Return a line on the runs that lack content of others, with the command for the first of them."""
    without = [run for run in runs if run not in has]
    if not without or not has:
        return Html("")
    return missing(f"Without: {', '.join(run.label for run in without)}.", command(without[0]))


def drawn(plots: Sequence[Plot], *, wide: bool = False) -> tuple[Html, tuple[Picture, ...]]:
    """Return plots in a grid, and their pictures."""
    pictures = tuple(map(render, plots))
    grid = "plots wide" if wide else "plots"
    return tag("div", *(picture.figure for picture in pictures), attributes={"class": grid}), pictures
