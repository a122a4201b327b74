"""``falign sample``."""

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
        typer.Option("--file", "-f", help="A line each (.txt), or rows with `prompt`, text or turns (.jsonl ...)."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 decodes greedily. Default: 0, or 1 with --verifier.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    dtype: Annotated[str, typer.Option(help="For a model; a run has its own.")] = "auto",
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    verifier: Annotated[
        str | None,
        typer.Option(
            help="Split the prompts of --file by what the model solves: module:function or a built-in reward, 1 where "
            "a completion is correct.",
            rich_help_panel=PRESAMPLING,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of exploration.jsonl and rehearsal.jsonl.", rich_help_panel=PRESAMPLING),
    ] = None,
    num_completions: Annotated[
        int | None, typer.Option(min=1, help="Per prompt. Default: 8.", rich_help_panel=PRESAMPLING)
    ] = None,
    threshold: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many must be correct to be rehearsed. Default: all of them.", rich_help_panel=PRESAMPLING
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="The prompt, with a row's columns in braces: '{question}'.", rich_help_panel=PRESAMPLING),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain",
            help="Whether a plain prompt is a user's turn. Default: with a chat template.",
            rich_help_panel=PRESAMPLING,
        ),
    ] = None,
    bad_rows: Annotated[
        str | None, typer.Option(help="error stops at the first, skip counts them.", rich_help_panel=PRESAMPLING)
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Replace existing outputs.", rich_help_panel=PRESAMPLING)
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Answer prompts with a trained run or any model, or sort them by what it solves (--verifier)."""
    from falign.evaluation.answering import load_named, read_prompts
    from falign.evaluation.answering import sample as answer

    given = {
        "--out": out, "--num-completions": num_completions, "--threshold": threshold, "--template": template,
        "--chat": chat, "--bad-rows": bad_rows, "--overwrite": overwrite,
    }  # fmt: skip
    if verifier is not None:
        if file is None or out is None or prompt or json_lines or temperature not in (None, 1.0):
            raise ConfigError(
                "--verifier needs --file and --out, and samples from the model itself: leave out --prompt, --json and "
                "any --temperature but 1."
            )
        from falign.evaluation.presampling_run import Presampling

        count = 8 if num_completions is None else num_completions
        presampling = Presampling(
            model=model,
            file=file,
            out=out,
            verifier=verifier,
            num_completions=count,
            threshold=count if threshold is None else threshold,
            max_new_tokens=max_new_tokens,
            seed=seed,
            template=template,
            chat=chat,
            bad_rows="error" if bad_rows is None else bad_rows,
            overwrite=bool(overwrite),
            console=CommandTerminal(stderr=True, highlight=False, soft_wrap=True),
        )
        with Terminal(stderr=True).status(f"loading {escape(model)}"):
            policy, tokenizer = load_named(model, dtype=dtype, trust_code=trust_code)
        show(presampling.run(policy, tokenizer), out)
        return
    if alone := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{', '.join(alone)} belongs to --verifier: give a verifier, or leave it out.")
    prompts: list[Text] = [*(prompt or []), *(read_prompts(file) if file else [])]
    if not prompts:
        raise ConfigError("no prompt is given: use --prompt TEXT or --file FILE.")
    console = Terminal()
    with Terminal(stderr=True).status(f"loading {escape(model)}"):
        answers = answer(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature or 0.0,
            seed=seed,
            dtype=dtype,
            trust_code=trust_code,
        )
    for text, reply in zip(prompts, answers, strict=True):
        if json_lines:
            typer.echo(json_line({"prompt": text, "completion": reply}))
        else:
            shown = text if isinstance(text, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)
            console.print(shown, style="bold", markup=False, highlight=False)
            console.print(reply + "\n", markup=False, highlight=False)


def show(summary: PresamplingSummary, out: Path) -> None:
    """Print what became of the prompts."""
    table = Table("", "", title=str(out), title_justify="left", show_header=False)
    for name, value in summary.counts().items():
        if value or name in {"prompts", "rehearsal", "exploration"}:
            table.add_row(name, f"{value:.1%}" if isinstance(value, float) else f"{value:,}")
    if summary.resumed:
        table.add_row("of the prompts sampled by an earlier call", f"{summary.resumed:,}")
    Terminal(highlight=False).print(table)
