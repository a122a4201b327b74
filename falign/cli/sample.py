"""``falign sample``: answer prompts, or sort them by whether the model solves them (``--verifier``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from falign.cli.options import CommandTerminal, TrustCode, with_options_named
from falign.errors import ConfigError
from falign.terminal import Terminal, json_line

if TYPE_CHECKING:
    from falign.data import Text
    from falign.evaluation.presampling_run import PresamplingSummary

__all__ = ["sample"]

PRESAMPLING = "Pre-sampling"


@with_options_named
def sample(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or any model.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A file of prompts: one per line (.txt), or a column `prompt` (.jsonl ...)."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum tokens per completion.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", min=0.0, help="0 decodes greedily. Default: 0, or 1 with --verifier.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="Dtype of a model; a run has its own.")] = "auto",
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
    verifier: Annotated[
        str | None,
        typer.Option(
            help="Sort the prompts of --file by whether the model solves them. A built-in reward or module:function "
            "that gives 1 to correct completions.",
            rich_help_panel=PRESAMPLING,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Target folder of exploration.jsonl and rehearsal.jsonl.", rich_help_panel=PRESAMPLING),
    ] = None,
    num_completions: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Completions per prompt. Default: 8.", rich_help_panel=PRESAMPLING),
    ] = None,
    threshold: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Correct completions that a prompt needs to go to rehearsal. Default: all of them.",
            rich_help_panel=PRESAMPLING,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="The prompt, with columns in braces: '{question}'.", rich_help_panel=PRESAMPLING),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain",
            help="Read plain prompts as a user's turn, or as they are. Default: as the run; else by template.",
            rich_help_panel=PRESAMPLING,
        ),
    ] = None,
    bad_rows: Annotated[
        str | None,
        typer.Option(help="At a bad row: error stops, skip leaves it out and counts it.", rich_help_panel=PRESAMPLING),
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option("--overwrite", help="Start over, and replace existing outputs.", rich_help_panel=PRESAMPLING),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Answer prompts with a trained run or any model; or sort prompts by whether it solves them (--verifier)."""
    given = {
        "out": out,
        "num_completions": num_completions,
        "threshold": threshold,
        "template": template,
        "chat": chat,
        "bad_rows": bad_rows,
        "overwrite": overwrite,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if verifier is None:
        if given:
            without_effect = ", ".join(f"`{name}`" for name in given)
            raise ConfigError(f"{without_effect}: this has no effect without --verifier.")
        _answer(
            model,
            prompt or [],
            file,
            json_lines=json_lines,
            max_new_tokens=max_new_tokens,
            temperature=temperature or 0.0,
            seed=seed,
            dtype=dtype,
            trust_code=trust_code,
        )
        return
    if file is None or out is None or prompt or json_lines or temperature not in (None, 1.0):
        raise ConfigError(
            "--verifier needs --file and --out, and samples at temperature 1: leave out --prompt, --json and "
            "--temperature."
        )
    from falign.evaluation.presampling_run import presample

    summary = presample(
        model,
        file,
        verifier=verifier,
        max_new_tokens=max_new_tokens,
        seed=seed,
        dtype=dtype,
        trust_code=trust_code,
        console=CommandTerminal(stderr=True, highlight=False, soft_wrap=True),
        **given,
    )
    _show(summary, out)


def _answer(
    model: str,
    prompt: list[str],
    file: Path | None,
    *,
    json_lines: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str,
    trust_code: bool,
) -> None:
    """Print the answers to prompts from the command line and from a file."""
    from falign.evaluation.answering import read_prompts
    from falign.evaluation.answering import sample as answer

    prompts: list[Text] = [*prompt, *(read_prompts(file) if file else [])]
    if not prompts:
        raise ConfigError("no prompt is given: use --prompt TEXT or --file FILE.")
    with Terminal(stderr=True).status(f"loading {escape(model)}"):
        answers = answer(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            dtype=dtype,
            trust_code=trust_code,
        )
    console = Terminal()
    for text, reply in zip(prompts, answers, strict=True):
        if json_lines:
            typer.echo(json_line({"prompt": text, "completion": reply}))
        else:
            shown = text if isinstance(text, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)
            console.print(shown, style="bold", markup=False, highlight=False)
            console.print(reply + "\n", markup=False, highlight=False)


def _show(summary: PresamplingSummary, out: Path) -> None:
    """Print how many prompts went where."""
    table = Table("", "", title=str(out), title_justify="left", show_header=False)
    for name, value in summary.counts().items():
        if value or name in {"prompts", "rehearsal", "exploration"}:
            table.add_row(name, f"{value:.1%}" if isinstance(value, float) else f"{value:,}")
    if summary.resumed:
        table.add_row("prompts sampled by an earlier call", f"{summary.resumed:,}")
    Terminal(highlight=False).print(table)
