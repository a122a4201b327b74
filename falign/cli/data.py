"""``falign data``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from falign.errors import ConfigError, DataError
from falign.plain_yaml import plain_yaml
from falign.terminal import Terminal

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
            help="A file, folder, Hub name, or demo:polite-preference; demo:one-digit-arithmetic needs --columns.",
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
        list[str] | None, typer.Option(help="A column that looks like a part of the prompt and is none; repeatable.")
    ] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Refuse a larger share of prompts that drift; a run only warns."),
    ] = None,
    keep: Annotated[int, typer.Option(min=0, help="How many bad rows to show.")] = 10,
) -> None:
    """Count rows, lengths, cuts, duplicates and bad rows; exit status 2 if a run would not start."""
    from falign.data import DataSource, Window
    from falign.data import check as inspect

    lengths = {
        "max_length": max_length,
        "max_completion_length": max_completion_length,
        "long_prompt": long_prompt,
        "long_completion": long_completion,
    }
    given = {name: value for name, value in lengths.items() if value is not None}
    tokenizer, window, stops = None, None, frozenset[int]()
    if model is None:
        if about_tokens := [*given, *(["chat_template"] if chat_template else [])]:
            raise ConfigError(f"--{about_tokens[0].replace('_', '-')} is about tokens: give --model.")
    else:
        from falign.models import load_tokenizer, stop_token_ids

        tokenizer = load_tokenizer(model, chat_template=chat_template)
        stops = stop_token_ids(model, tokenizer)
        window = Window(**{"max_length": 1024, **given})
    mapping = column_mapping(columns)
    source = DataSource(file, split=split, format=format, columns=mapping, chat=chat, ignore=tuple(ignore or ()))
    report = inspect(
        source,
        tokenizer=tokenizer,
        stop_token_ids=stops,
        window=window,
        keep=keep,
    )
    console = Terminal(highlight=False)
    counts = Table("", "rows", title=escape(f"{file} ({report.source.format})"), title_justify="left")
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
    if not report.source.read:
        raise DataError(f"{file} has no rows: give a file with at least one.")
    if not report.source.bad and not report.source.kept:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in report.source.dropped.items())
        raise DataError(
            f"{file}: the window drops all {report.source.read} rows ({reasons}): raise --max-length, or cut what is "
            "too long (--long-prompt cut, --long-completion cut)."
        )
    if not report.ok:
        raise DataError(
            f"{file}: {report.source.bad} bad rows; mend them, or set data.bad_rows=skip to leave them out."
        )
    if max_drift is not None and report.source.drift_share > max_drift:
        raise DataError(
            f"{file}: in {report.source.drift_share:.1%} of the rows the last prompt tokens change once a completion "
            f"follows (at most {max_drift:.1%} pass): end prompts with a line break or a template's header."
        )


def column_mapping(text: str) -> dict[str, str]:
    """Return what the option --columns says."""
    value = plain_yaml(text, place=f"--columns {text!r}")
    if not isinstance(value, dict) or not all(isinstance(name, str) for pair in value.items() for name in pair):
        raise ConfigError(f"--columns {text!r} must be a mapping of names, as in '{{prompt: question}}'.")
    return value
