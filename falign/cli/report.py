"""``falign report``: what became better in the terminal, and all of it in one page that a person reads."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer
from rich.text import Text

from falign.cli.run_summary import show
from falign.terminal import Terminal

__all__ = ["report"]


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN ...", help="Run folders.")],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR|FILE.html",
            help="Where the report goes; the folder of a single run, or this folder, when left out.",
        ),
    ] = None,
) -> None:
    """Show what runs achieved, and write a page of it: one HTML file, and its plots as PNG files beside it."""
    console = Terminal()
    with console.status("drawing"):
        from falign.report import write_report
        from falign.runs.summary import RunSummary

        written = write_report(runs, out)
    for run in written.runs:
        if run.ended:
            show(RunSummary(run.folder, run.before, run.after, run.samples), console)
            continue
        command = f"falign train {shlex.quote(str(run.folder.run_file))} --resume"
        text = f"{run.folder.path} has not ended; what was stopped goes on by: {command}"
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print("report", Text(str(written.page), style="bold"), f" {len(written.pictures)} PNG files in", end=" ")
    console.print(Text(str(written.figures), style="bold"), soft_wrap=True)
