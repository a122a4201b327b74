"""``falign data``: check data before training on it."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from falign.cli.options import TrustCode, options_named, with_options_named
from falign.errors import ConfigError
from falign.plain_yaml import plain_yaml
from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.data import DataReport

__all__ = ["app", "check", "column_mapping"]

app = typer.Typer(help="Check data before training on it.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Check data before training on it."""


@app.command("check")
def check(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A file, a folder, a Hub dataset or demo:polite-preference; or a run file (.yaml), whose data are "
            "checked under its objective, as falign train reads them.",
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Count lengths in this model's tokens. Default: in words.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="Chat template: Jinja, or a file that contains it.")] = None,
    format: Annotated[str, typer.Option(help="Format of the rows; auto detects it from the columns.")] = "auto",
    split: Annotated[str, typer.Option(help="Split of a folder or a Hub dataset.")] = "train",
    max_length: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Maximum tokens of prompt and completion together. Default: 1024."),
    ] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Maximum tokens of a completion. Default: no separate limit.")
    ] = None,
    long_prompt: Annotated[
        str | None, typer.Option(help="For a prompt that is too long: error, cut or drop. Default: error.")
    ] = None,
    long_completion: Annotated[
        str | None, typer.Option(help="For a completion that is too long: cut, drop or error. Default: cut.")
    ] = None,
    columns: Annotated[str, typer.Option(help="The file's name for each column: '{prompt: question}'.")] = "{}",
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain",
            help="Read plain texts as chat turns, or as they are; required if the model has a chat template.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="A column to ignore although it looks like part of the prompt; may be repeated."),
    ] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            min=0,
            max=1,
            help="Highest allowed share of rows whose last prompt tokens change when a completion follows. Default: "
            "only warn.",
        ),
    ] = None,
    keep: Annotated[int, typer.Option(metavar="N", min=0, help="Number of bad rows to show.")] = 10,
    trust_code: TrustCode = False,
) -> None:
    """Count rows, lengths, cuts, duplicates and bad rows. Exit with status 2 if a run would not start."""
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
    # Fields of a run file have names like those of options. So in a message about a run file, only the options that
    # were given are written as options.
    parameters = inspect.signature(check_data).parameters
    given = [name for name, value in options.items() if value != parameters[name].default]
    names = ["trust_code", *given] if is_run_file(file) else list(options)

    @with_options_named(names=names)
    def run() -> None:
        result = check_data(file, **options)
        console = Terminal(highlight=False)
        for report in result.sources:
            _show(report, console, names)
        for notice in result.notices:
            style = "yellow" if notice.is_warning else None
            console.print(notice.text, style=style, markup=False, soft_wrap=True)
        result.require_ok()

    run()


def _show(report: DataReport, console: Terminal, names: Collection[str]) -> None:
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
        console.print(options_named(message, names), style="red", markup=False, soft_wrap=True)
    for remark in report.source.remarks():
        console.print(options_named(remark, names), style="yellow", markup=False, soft_wrap=True)


def column_mapping(text: str) -> dict[str, str]:
    """Parse the option ``--columns``: a YAML mapping from falign's column names to the file's."""
    value = plain_yaml(text, place=f"--columns {text!r}")
    if not isinstance(value, dict) or not all(isinstance(name, str) for pair in value.items() for name in pair):
        raise ConfigError(f"--columns {text!r} must be a mapping of names, as in '{{prompt: question}}'.")
    return value
