"""``falign data``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from falign.cli.options import TrustCode, with_options_named
from falign.errors import ConfigError
from falign.plain_yaml import plain_yaml
from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.data import DataReport

__all__ = ["app", "check", "column_mapping"]

app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Look at data before training on it."""


@app.command("check")
def check(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A file, folder, Hub name, or demo:polite-preference; or a run file (.yaml), whose data are checked "
            "as falign train reads them, under its objective.",
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Count in this model's tokens; words when left out.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="A Jinja template, or a file with one.")] = None,
    format: Annotated[str, typer.Option(help="Layout; auto tells it from the columns.")] = "auto",
    split: Annotated[str, typer.Option()] = "train",
    max_length: Annotated[
        int | None, typer.Option(min=2, help="The window, prompt and completion together; 1024 when left out.")
    ] = None,
    max_completion_length: Annotated[int | None, typer.Option(min=1)] = None,
    long_prompt: Annotated[
        str | None, typer.Option(help="error, cut or drop, as in the run file; error when left out.")
    ] = None,
    long_completion: Annotated[str | None, typer.Option(help="cut, drop or error; cut when left out.")] = None,
    columns: Annotated[str, typer.Option(help="What the file calls falign's columns: '{prompt: question}'.")] = "{}",
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain", help="Whether plain texts are turns; needed where the model has a chat template."
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A column that looks like a part of the prompt and is not one; repeatable.")
    ] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Refuse a larger share of prompts that drift; a run only warns."),
    ] = None,
    keep: Annotated[int, typer.Option(min=0, help="How many bad rows to show.")] = 10,
    trust_code: TrustCode = False,
) -> None:
    """Count rows, lengths, cuts, duplicates and bad rows; exit status 2 if a run would not start."""
    from falign.training.data_check import check_data, is_run_file

    options = {
        "model": model,
        "chat_template": chat_template,
        "format": format,
        "split": split,
        "columns": column_mapping(columns) or None,
        "chat": chat,
        "ignore": tuple(ignore or ()),
        "max_length": max_length,
        "max_completion_length": max_completion_length,
        "long_prompt": long_prompt,
        "long_completion": long_completion,
        "max_drift": max_drift,
        "keep": keep,
        "trust_code": trust_code,
    }
    # Fields of a run file have the names of options, so messages about it name only options that were given.
    usual = inspect.signature(check_data).parameters
    given = [name for name, value in options.items() if value != usual[name].default]

    @with_options_named(names=["trust_code", *given] if is_run_file(file) else options)
    def run() -> None:
        found = check_data(file, **options)
        console = Terminal(highlight=False)
        for report in found.sources:
            _show(report, console)
        for notice in found.notices:
            style = "yellow" if notice.is_warning else None
            console.print(notice.text, style=style, markup=False, soft_wrap=True)
        found.require_ok()

    run()


def _show(report: DataReport, console: Terminal) -> None:
    title = escape(f"{report.source.path} ({report.source.format})")
    counts = Table("", "rows", title=title, title_justify="left")
    for label, count in report.counts():
        counts.add_row(label, f"{count:,}")
    console.print(counts)
    lengths = Table(f"length in {report.unit}", "count", "median", "90 %", "99 %", "longest")
    for name, *numbers in report.length_rows():
        lengths.add_row(name, *(f"{number:,}" for number in numbers))
    console.print(lengths)
    for message in report.source.messages:
        console.print(message, style="red", markup=False, soft_wrap=True)
    for remark in report.source.remarks():
        console.print(remark, style="yellow", markup=False, soft_wrap=True)


def column_mapping(text: str) -> dict[str, str]:
    """Return what the option --columns says."""
    value = plain_yaml(text, place=f"--columns {text!r}")
    if not isinstance(value, dict) or not all(isinstance(name, str) for pair in value.items() for name in pair):
        raise ConfigError(f"--columns {text!r} must be a mapping of names, as in '{{prompt: question}}'.")
    return value
