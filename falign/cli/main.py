"""``falign``: the commands, and the exit status and message of an error."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from rich.markup import escape

from falign.cli import audit, data, divergences, evaluate, export, import_, pairs, report, sample, score, soup, train
from falign.cli.foreign_output import clean, cleaned_output, quiet
from falign.cli.installed import require_supported_releases, shown_versions
from falign.cli.launch import end_quietly, leave_failure
from falign.durable import is_full_disk
from falign.errors import FalignError, StoppedError
from falign.foreign.names import KINDS_OF_METHODS
from falign.terminal import Terminal

__all__ = ["app", "main"]

# From click, or from the copy of click inside newer releases of typer: taken from typer, it is the right one.
UsageError: Any = typer.BadParameter.__base__

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 plus the number of SIGINT."""

app = typer.Typer(
    name="falign",
    help="Align a language model under the f-divergence of your choice.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_versions(wanted: bool) -> bool:
    if wanted:
        print(shown_versions())
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_show_versions,
            help="Show the versions of falign and of the libraries it trains with.",
        ),
    ] = False,
) -> None:
    pass


app.command("train")(train.train)
app.command("import", context_settings=import_.FOREIGN_OPTIONS)(import_.import_)
app.command("report")(report.report)
app.command("sample")(sample.sample)
app.command("score")(score.score)
app.command("pairs")(pairs.pairs)
app.command("export")(export.export)
app.command("soup", cls=soup.SoupCommand)(soup.soup)
app.command("audit")(audit.audit)
app.command("divergences")(divergences.divergences)
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="evaluate")
for _method in KINDS_OF_METHODS:
    app.command(_method, hidden=True, context_settings=import_.FOREIGN_OPTIONS)(import_.answer_method(_method))


def main() -> None:
    """Run the command line; report an error that the user can fix without a traceback, with exit status 2."""
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
            status = _report_error(error)
    sys.exit(status or 0)


def _report_error(error: BaseException) -> int:
    """Print an error, or leave it to the launcher; return the exit status."""
    message = _user_message(error)
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


def _user_message(error: BaseException) -> str | None:
    """Return the message of an error that the user can fix; None for other errors, which need their traceback."""
    if isinstance(error, FalignError):
        return str(error)
    if isinstance(error, UsageError):
        return _usage_message(error)
    if is_full_disk(error):
        place = getattr(error, "filename", None) or "a file could not be written"
        return (
            f"{place}: the disk is full. Free some space, or choose a folder on another disk; complete files are kept."
        )
    # Other errors of the operating system (no permission, a file in place of a folder) name their path themselves.
    return str(error) if isinstance(error, OSError) else None


def _usage_message(error: Any) -> str:
    """Return the message of a wrong command line; ``""`` if its help was shown instead."""
    if error.ctx is None or not error.format_message():
        return error.format_message()
    message = error.format_message().replace("Value error, ", "")  # the prefix of pydantic
    end = "" if message.endswith((".", "?")) else "."
    return f"{message}{end} See {error.ctx.command_path} --help."
