"""``falign report``: the results of runs in the terminal, and a report in HTML."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer
from rich.text import Text

from falign.cli.options import with_options_named
from falign.cli.run_summary import show
from falign.terminal import Terminal

__all__ = ["report"]


@with_options_named
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN ...", help="Run folders.")],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR|FILE.html",
            help="Target folder or file. Default: the run's folder; for several runs, the current folder.",
        ),
    ] = None,
) -> None:
    """Show the results of runs, and write a report: one HTML page, with its plots also as PNG files."""
    console = Terminal()
    with console.status("drawing"):
        from falign.report import write_report
        from falign.runs.summary import RunSummary

        written = write_report(runs, out)
    for run in written.runs:
        if run.ended:
            show(RunSummary(run.folder, run.before, run.after, run.samples, run.best), console)
            continue
        command = f"falign train {shlex.quote(str(run.folder.run_file))} --resume"
        text = f"{run.folder.path} has not ended. If it was stopped, resume it by: {command}"
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print("report", Text(str(written.page), style="bold"), f" {len(written.pictures)} PNG files in", end=" ")
    console.print(Text(str(written.figures), style="bold"), soft_wrap=True)
