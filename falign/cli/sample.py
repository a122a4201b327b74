"""``falign sample``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from falign.cli.options import TrustCode
from falign.errors import ConfigError, DataError
from falign.json_lines import split_lines
from falign.runs.loading import chat_of_run, load_trained
from falign.terminal import Terminal, json_line

if TYPE_CHECKING:
    from falign.data import Row, Text

__all__ = ["sample"]

PRESAMPLING = "Pre-sampling"


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
        bool | None, typer.Option("--overwrite", help="Sample anew.", rich_help_panel=PRESAMPLING)
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Answer prompts with a trained run or any model, or sort them by what it solves (--verifier)."""
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
        )
        with Terminal(stderr=True).status(f"loading {escape(model)}"):
            policy, tokenizer = _load(model, dtype, trust_code=trust_code)
        presampling.run(policy, tokenizer)
        return
    if alone := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{', '.join(alone)} belongs to --verifier: give a verifier, or leave it out.")
    prompts: list[Text] = [*(prompt or []), *(_read_prompts(file) if file else [])]
    if not prompts:
        raise ConfigError("no prompt is given: use --prompt TEXT or --file FILE.")
    console = Terminal()
    with Terminal(stderr=True).status(f"loading {escape(model)}"):
        policy, tokenizer = _load(model, dtype, trust_code=trust_code)
    from falign.models import stop_token_ids
    from falign.models.adapters import base_of
    from falign.rollouts.answers import answer

    answers = answer(
        policy,
        tokenizer,
        prompts,
        chat=chat_of_run(model) is not False,
        stop_token_ids=stop_token_ids(base_of(policy), tokenizer),
        max_new_tokens=max_new_tokens,
        temperature=temperature or 0.0,
        seed=seed,
    )
    for text, reply in zip(prompts, answers, strict=True):
        if json_lines:
            typer.echo(json_line({"prompt": text, "completion": reply}))
        else:
            shown = text if isinstance(text, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)
            console.print(shown, style="bold", markup=False, highlight=False)
            console.print(reply + "\n", markup=False, highlight=False)


def _load(name: str, dtype: str, *, trust_code: bool) -> tuple[Any, Any]:
    import torch

    from falign.models import load_model, load_tokenizer
    from falign.runs import RunFolder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (Path(name) / "manifest.json").is_file():
        trained = load_trained(RunFolder.open(name), trust_code=trust_code)
        trained.model.to(device)  # pyright: ignore[reportArgumentType]
        return trained.model, trained.tokenizer
    return load_model(name, dtype=dtype, device=device), load_tokenizer(name)


def _read_prompts(file: Path) -> list[Text]:
    if file.suffix == ".txt":
        if not file.is_file():
            raise DataError(f"No file of prompts at {file}.")
        try:
            lines = split_lines(file.read_text(encoding="utf-8-sig"))
            return [line.removesuffix("\r") for line in lines if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    from falign.data import read_rows

    return [_prompt_of(row) for row in read_rows(file)]


def _prompt_of(row: Row) -> Text:
    from falign.data.conversations import read_text
    from falign.data.examples import prompt_turns

    value, system = row.fields.get("prompt"), row.fields.get("system")
    if value is None or not isinstance(system, str | None):
        problem = "there is no `prompt`" if value is None else f"`system` must be text, got {system!r:.60}"
        raise DataError(f"{row.place}: {problem}; columns: {sorted(row.fields)}.")
    prompt = read_text(value, place=row.place, field="prompt")
    return prompt if isinstance(prompt, str) and system is None else prompt_turns(prompt, system, row.place)
