"""``falign sample``: answer prompts, write samples to a file, or sort prompts by a verifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from falign.cli.options import CommandTerminal, TrustCode, with_options_named
from falign.errors import ConfigError
from falign.terminal import Terminal, json_line

if TYPE_CHECKING:
    from falign.data import Text
    from falign.evaluation.presampling_run import PresamplingSummary
    from falign.evaluation.sampling_run import SamplingSummary

__all__ = ["sample"]

FILES = "Files of samples (--out), and pre-sampling (--verifier)"
PRESAMPLING = "Pre-sampling"


@with_options_named
def sample(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or any model.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A file of prompts: one per line (.txt), or a column `prompt` (.jsonl ...)."),
    ] = None,
    num_completions: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Completions per prompt. Default: 1, or 8 with --verifier.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum tokens per completion.")] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", min=0.0, help="0 decodes greedily. Default: 0; 1 with --out or --verifier."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="Dtype of a model; a run has its own.")] = "auto",
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the samples of --file (.jsonl); with --verifier, folder of exploration.jsonl and "
            "rehearsal.jsonl.",
            rich_help_panel=FILES,
        ),
    ] = None,
    rewards: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|RUN", help="Also write the rewards that a YAML file lists, or a run's.", rich_help_panel=FILES
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="The prompt, with columns in braces: '{question}'.", rich_help_panel=FILES),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain",
            help="Read plain prompts as a user's turn, or as they are. Default: as the run; else by template.",
            rich_help_panel=FILES,
        ),
    ] = None,
    bad_rows: Annotated[
        str | None,
        typer.Option(help="At a bad row: error stops, skip leaves it out and counts it.", rich_help_panel=FILES),
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option("--overwrite", help="Start over, and replace existing outputs.", rich_help_panel=FILES),
    ] = None,
    verifier: Annotated[
        str | None,
        typer.Option(
            help="Sort the prompts of --file by whether the model solves them. A built-in reward or module:function "
            "that gives 1 to correct completions.",
            rich_help_panel=PRESAMPLING,
        ),
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
    trust_code: TrustCode = False,
) -> None:
    """Answer prompts with a run or any model; write samples (--out); or sort prompts by a verifier (--verifier)."""
    of_files = {"template": template, "chat": chat, "bad_rows": bad_rows, "overwrite": overwrite}
    of_presampling = {"threshold": threshold}
    given = {name: value for name, value in of_files.items() if value is not None}
    shared = {"max_new_tokens": max_new_tokens, "seed": seed, "dtype": dtype, "trust_code": trust_code}
    console = CommandTerminal(stderr=True, highlight=False, soft_wrap=True)
    if verifier is None:
        _refuse_without("--verifier", of_presampling)
    if out is None and verifier is None:
        _refuse_without("--out", {**of_files, "rewards": rewards})
        _answer(
            model,
            prompt or [],
            file,
            json_lines=json_lines,
            num_completions=num_completions or 1,
            temperature=temperature or 0.0,
            **shared,
        )
    elif verifier is None:
        assert out is not None
        if file is None or prompt or json_lines:
            raise ConfigError("--out writes the samples of --file: give that, without --prompt and --json.")
        from falign.evaluation.sampling_run import write_samples

        written = write_samples(
            model,
            file,
            out,
            num_completions=num_completions or 1,
            rewards=rewards,
            temperature=1.0 if temperature is None else temperature,
            console=console,
            **shared,
            **given,
        )
        _show_samples(written, out, console)
    else:
        if file is None or out is None or prompt or json_lines or rewards or temperature not in (None, 1.0):
            raise ConfigError(
                "--verifier needs --file and --out, and samples at temperature 1: leave out --prompt, --json, "
                "--rewards and --temperature."
            )
        from falign.evaluation.presampling_run import presample

        given |= {} if num_completions is None else {"num_completions": num_completions}
        given |= {} if threshold is None else {"threshold": threshold}
        _show(presample(model, file, verifier=verifier, out=out, console=console, **shared, **given), out)


def _refuse_without(option: str, given: Mapping[str, Any]) -> None:
    if names := [f"`{name}`" for name, value in given.items() if value is not None]:
        raise ConfigError(f"{', '.join(names)}: this has no effect without {option}.")


def _answer(
    model: str,
    prompt: list[str],
    file: Path | None,
    *,
    json_lines: bool,
    num_completions: int,
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
            num_completions=num_completions,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            dtype=dtype,
            trust_code=trust_code,
        )
    console = Terminal()
    asked = [text for text in prompts for _ in range(num_completions)]
    for number, (text, reply) in enumerate(zip(asked, answers, strict=True)):
        if json_lines:
            typer.echo(json_line({"prompt": text, "completion": reply}))
        else:
            shown = text if isinstance(text, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)
            if number % num_completions == 0:
                console.print(shown, style="bold", markup=False, highlight=False)
            console.print(reply + "\n", markup=False, highlight=False)


def _show_samples(summary: SamplingSummary, out: Path, console: Terminal) -> None:
    """Print the counts of a file of samples."""
    table = Table("", "", title=escape(str(out)), title_justify="left", show_header=False)
    for name, value in summary.model_dump(exclude={"messages", "mean_reward", "resumed"}).items():
        if value or name in {"prompts", "completions"}:
            table.add_row(name.replace("_", " "), f"{value:,}")
    if summary.mean_reward is not None:
        table.add_row("mean reward", f"{summary.mean_reward:+.4f}")
    if summary.resumed:
        table.add_row("prompts sampled by an earlier call", f"{summary.resumed:,}")
    Terminal(highlight=False).print(table)
    for message in summary.messages:
        console.print(f"bad row: {message}", style="yellow", markup=False)


def _show(summary: PresamplingSummary, out: Path) -> None:
    """Print how many prompts went where."""
    table = Table("", "", title=str(out), title_justify="left", show_header=False)
    for name, value in summary.counts().items():
        if value or name in {"prompts", "rehearsal", "exploration"}:
            table.add_row(name, f"{value:.1%}" if isinstance(value, float) else f"{value:,}")
    if summary.resumed:
        table.add_row("prompts sampled by an earlier call", f"{summary.resumed:,}")
    Terminal(highlight=False).print(table)
