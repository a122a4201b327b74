"""``falign train``: run, and show what became better."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from falign.cli.achieved import show

__all__ = ["train"]


def train(
    run_file: Annotated[str, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.field=value ...]", help="Fields to set otherwise.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave out steps whose loss, gradient or reward is no number, and count them."),
    ] = False,
) -> None:
    """Train what a run file describes, and show what became better."""
    console = Console()
    # A divergence of one's own (module:attribute) lies beside the run file or in the working folder.
    sys.path[:0] = [str(Path.cwd()), str(Path(run_file).absolute().parent)]
    with console.status("starting"):
        from falign.training import load_run_file
        from falign.training import train as run

        config = load_run_file(run_file, [*(overrides or []), *(["training.skip_bad=true"] if skip_bad else [])])
    show(run(config, resume=resume), console)
