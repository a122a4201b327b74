"""``falign``: one command per job; what a user can mend ends with a message and exit status 2."""

from __future__ import annotations

import sys
import traceback

import typer
from rich.markup import escape

from falign.cli import data, divergences, evaluate, export, report, sample, score, soup, train
from falign.cli.failures import end_quietly, leave_failure
from falign.cli.installed import require_supported_releases
from falign.cli.quiet import quiet
from falign.errors import FalignError, StoppedError
from falign.full_disk import is_full_disk
from falign.passwords import without_secrets
from falign.terminal import Terminal, harmless

__all__ = ["app", "main"]

app = typer.Typer(
    name="falign",
    help="Align a language model under the f-divergence of your choice.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("train")(train.train)
app.command("report")(report.report)
app.command("sample")(sample.sample)
app.command("score")(score.score)
app.command("export")(export.export)
app.command("soup", cls=soup.SoupCommand)(soup.soup)
app.command("divergences")(divergences.divergences)
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="evaluate")


def main() -> None:
    """Run the command line; errors that a user can mend go to standard error, without a traceback."""
    quiet()
    end_quietly()
    try:
        require_supported_releases()
        app()
    except Exception as error:
        message = _mendable(error)
        if message is None:
            report = harmless(without_secrets(traceback.format_exc()))
            if not leave_failure(report):
                print(report, end="", file=sys.stderr)
            sys.exit(1)
        message = without_secrets(message)
        if not leave_failure(harmless(f"error: {message}\n")):
            label = "[bold yellow]stopped:[/]" if isinstance(error, StoppedError) else "[bold red]error:[/]"
            Terminal(stderr=True, highlight=False, soft_wrap=True).print(f"{label} {escape(message)}")
        sys.exit(error.exit_status if isinstance(error, FalignError) else 2)


def _mendable(error: Exception) -> str | None:
    """Return what to tell of an error that a user can mend; None for all others."""
    if isinstance(error, FalignError):
        return str(error)
    if is_full_disk(error):
        place = getattr(error, "filename", None) or "a file could not be written"
        return f"{place}: the disk is full. Free some space, or choose a folder on another disk; what is whole stays."
    # An operating system's error (no permission, a file where a folder should be) names its path itself.
    return str(error) if isinstance(error, OSError) else None
