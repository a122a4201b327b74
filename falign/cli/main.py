"""``falign``: one command per job; errors that a user can fix end with a message and exit status 2."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer
from rich.markup import escape

from falign.cli import data, divergences, evaluate, export, report, sample, score, soup, train
from falign.cli.foreign_output import clean, cleaned_output, quiet
from falign.cli.installed import require_supported_releases
from falign.cli.launch import end_quietly, leave_failure
from falign.durable import is_full_disk
from falign.errors import FalignError, StoppedError
from falign.terminal import Terminal

__all__ = ["app", "main"]

# The class of click, or of the copy of click that newer releases of typer contain.
UsageError: Any = typer.BadParameter.__base__

INTERRUPTED = 130

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
    """Run the command line; errors that a user can fix go to standard error, without a traceback."""
    quiet()
    end_quietly()
    with cleaned_output():
        try:
            require_supported_releases()
            status = app(standalone_mode=False)
        except (SystemExit, KeyboardInterrupt):
            raise
        except typer.Abort:
            status = INTERRUPTED
        except BaseException as error:  # a panic in a Rust library is not an Exception
            status = _tell(error)
    sys.exit(status or 0)


def _tell(error: BaseException) -> int:
    """Print an error, or leave it to the launcher; return the exit status."""
    message = _mendable(error)
    if message is None:
        report = clean("".join(traceback.format_exception(error)))
        if not leave_failure(report):
            print(report, end="", file=sys.stderr)
        return 1
    message = clean(message)
    label, style = ("stopped:", "bold yellow") if isinstance(error, StoppedError) else ("error:", "bold red")
    if message and not leave_failure(f"{label} {message}\n"):
        Terminal(stderr=True, highlight=False, soft_wrap=True).print(f"[{style}]{label}[/] {escape(message)}")
    return error.exit_status if isinstance(error, FalignError) else 2


def _mendable(error: BaseException) -> str | None:
    """Return the message of an error that a user can fix; None for all others."""
    if isinstance(error, FalignError):
        return str(error)
    if isinstance(error, UsageError):
        return _usage(error)
    if is_full_disk(error):
        place = getattr(error, "filename", None) or "a file could not be written"
        return f"{place}: the disk is full. Free some space, or choose a folder on another disk; what is whole stays."
    # An operating system's error (no permission, a file where a folder should be) names its path itself.
    return str(error) if isinstance(error, OSError) else None


def _usage(error: Any) -> str:
    """Return what is wrong with a command line; nothing where its help has been shown instead."""
    if error.ctx is None or not error.format_message():
        return error.format_message()
    message = error.format_message()
    end = "" if message.endswith((".", "?")) else "."
    return f"{message}{end} See {error.ctx.command_path} --help."
