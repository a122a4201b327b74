"""``falign data``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from falign.cli.options import TrustCode
from falign.errors import ConfigError, DataError
from falign.plain_yaml import plain_yaml
from falign.terminal import Terminal

if TYPE_CHECKING:
    from falign.data import DataReport

__all__ = ["app", "check", "column_mapping"]

LENGTHS = {
    "max_length": "--max-length",
    "max_completion_length": "--max-completion-length",
    "long_prompt": "--long-prompt",
    "long_completion": "--long-completion",
}
ABOUT_TOKENS = {*LENGTHS.values(), "--chat-template"}

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
    given = {
        "--model": model, "--chat-template": chat_template, "--max-length": max_length,
        "--max-completion-length": max_completion_length, "--long-prompt": long_prompt,
        "--long-completion": long_completion, "--chat": chat, "--ignore": ignore,
        "--format": None if format == "auto" else format, "--split": None if split == "train" else split,
        "--columns": None if columns == "{}" else columns,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    console = Terminal(highlight=False)
    if Path(file).suffix in (".yaml", ".yml"):
        if given:
            raise ConfigError(f"{next(iter(given))}: {file} is a run file, which has this itself; leave it out.")
        _check_run(file, keep=keep, max_drift=max_drift, trust_code=trust_code, console=console)
        return
    from falign.data import DataSource, Window
    from falign.data import check as inspect

    options: dict[str, Any] = {}
    if model is None:
        if about_tokens := [name for name in given if name in ABOUT_TOKENS]:
            raise ConfigError(f"{about_tokens[0]} is about tokens: give --model.")
    else:
        from falign.models import load_tokenizer, stop_token_ids

        lengths = {name: given[option] for name, option in LENGTHS.items() if option in given}
        tokenizer = load_tokenizer(model, chat_template=chat_template)
        options = {
            "tokenizer": tokenizer,
            "stop_token_ids": stop_token_ids(model, tokenizer),
            "window": Window(**{"max_length": 1024, **lengths}),
        }
    mapping = column_mapping(columns)
    source = DataSource(file, split=split, format=format, columns=mapping, chat=chat, ignore=tuple(ignore or ()))
    report = inspect(source, keep=keep, **options)
    _show(report, console)
    if report.source.format in ("unpaired", "completion"):
        console.print(
            "No row of this layout prefers a completion to another, which pairwise, listwise and token_pairwise "
            "objectives refuse. Give the run file in place of the data to check it under its objective.",
            style="yellow",
            soft_wrap=True,
        )
    _refuse(report, max_drift=max_drift)


def _check_run(file: str, *, keep: int, max_drift: float | None, trust_code: bool, console: Terminal) -> None:
    """Check the data of a run file: all rows of each source, then everything as the run begins with it."""
    from falign.data import check as inspect
    from falign.runs.named_code import load_own_run_file
    from falign.training.offline import read_data
    from falign.training.parts import load_language

    config = load_own_run_file(file, trust_code=trust_code)
    objective = config.check()
    if config.data is None:
        raise ConfigError(f"{file} has prompts and no data: falign train checks prompts before it loads any weights.")
    language = load_language(config)
    reports = [
        inspect(
            source.build(),
            tokenizer=language.tokenizer,
            stop_token_ids=language.stop_tokens,
            window=config.data.window,
            preferences="preference" in objective.needs,
            keep=keep,
        )
        for source in (*config.data.train, *config.data.eval)
    ]
    for report in reports:
        _show(report, console)
    for report in reports:
        _refuse(report, max_drift=max_drift, skips=config.data.bad_rows == "skip")
    read_data(
        config,
        language,
        objective,
        tell=lambda notice: console.print(
            notice.text, style="yellow" if notice.is_warning else None, markup=False, soft_wrap=True
        ),
    )


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


def _refuse(report: DataReport, *, max_drift: float | None, skips: bool = False) -> None:
    """Raise DataError where a run would not start on a source."""
    source = report.source
    if not source.read:
        raise DataError(f"{source.path} has no rows: give a file with at least one.")
    if source.bad and not (skips and source.kept):
        # To leave them out is a remedy only where others are left.
        remedy = "fix the file, or set data.bad_rows=skip to leave them out" if source.kept else "fix the file"
        raise DataError(f"{source.path}: {source.bad} bad {'row' if source.bad == 1 else 'rows'}; {remedy}.")
    if not source.kept:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in source.dropped.items())
        raise DataError(
            f"{source.path}: the window drops all {source.read} rows ({reasons}): raise --max-length, or cut what is "
            "too long (--long-prompt cut, --long-completion cut)."
        )
    if max_drift is not None and source.drift_share > max_drift:
        raise DataError(
            f"{source.path}: in {source.drift_share:.1%} of the rows the last prompt tokens change once a completion "
            f"follows (at most {max_drift:.1%} pass): end prompts with a line break or a template's header."
        )


def column_mapping(text: str) -> dict[str, str]:
    """Return what the option --columns says."""
    value = plain_yaml(text, place=f"--columns {text!r}")
    if not isinstance(value, dict) or not all(isinstance(name, str) for pair in value.items() for name in pair):
        raise ConfigError(f"--columns {text!r} must be a mapping of names, as in '{{prompt: question}}'.")
    return value
