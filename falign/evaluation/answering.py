"""Answers of a run or a model to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falign.data import Row, Text, read_rows
from falign.data.conversations import read_text
from falign.data.examples import prompt_turns
from falign.errors import ConfigError, DataError
from falign.json_lines import split_lines
from falign.runs.loading import Named, OpenRun, chat_of_run, is_run, named

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_named", "read_prompts", "sample"]


def load_named(
    model: Named, *, dtype: str = "auto", trust_code: bool = False
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Return the model of a run, or any model, with its tokenizer, on the device to compute on.

    Args:
        model: A run, or any model.
        dtype: Of a model; a run has its own.
        trust_code: Whether code that a run folder names may run.

    Raises:
        FalignError: It is not there, or damaged.
    """
    import torch

    from falign.models import load_model, load_tokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = named(model)[0]
    if is_run(name):
        run = model if isinstance(model, OpenRun) else OpenRun(name, trust_code=trust_code)
        run.policy.to(device)  # pyright: ignore[reportArgumentType]
        return run.policy, run.tokenizer
    return load_model(name, dtype=dtype, device=device), load_tokenizer(name)


def sample(
    model: Named,
    prompts: str | Sequence[Text],
    *,
    chat: bool | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "auto",
    trust_code: bool = False,
) -> list[str]:
    """Return one completion of each prompt.

    Args:
        model: A run, or any model.
        prompts: One text, or a list of texts and conversations (lists of turns).
        chat: Whether plain texts are a user's turns; as the run read its own, else where there is a chat template.
        max_new_tokens: Most tokens of a completion.
        temperature: 0 decodes greedily.
        seed: Of sampling.
        dtype: Of a model; a run has its own.
        trust_code: Whether code that a run folder names may run.

    Raises:
        ConfigError: There is no prompt, or no such run.
        ModelError: The model is not there, or damaged.
        RolloutError: A prompt leaves no room for a completion.
    """
    from falign.models import base_of, stop_token_ids
    from falign.rollouts.answers import answer

    if not prompts:
        raise ConfigError("prompts is empty: give at least one.")
    policy, tokenizer = load_named(model, dtype=dtype, trust_code=trust_code)
    chat = chat_of_run(named(model)[0]) if chat is None else chat
    return answer(
        policy,
        tokenizer,
        [prompts] if isinstance(prompts, str) else prompts,
        chat=chat is not False,
        stop_token_ids=stop_token_ids(base_of(policy), tokenizer),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )


def read_prompts(file: Path) -> list[Text]:
    """Return the prompts of a file: a line each (.txt), or rows with ``prompt``, text or turns.

    Raises:
        DataError: The file is not there, or a row has no prompt.
    """
    if file.suffix != ".txt":
        return [_prompt_of(row) for row in read_rows(file)]
    if not file.is_file():
        raise DataError(f"No file of prompts at {file}.")
    try:
        lines = split_lines(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    return [line.removesuffix("\r") for line in lines if line.strip()]


def _prompt_of(row: Row) -> Text:
    value: Any = row.fields.get("prompt")
    system = row.fields.get("system")
    if value is None or not isinstance(system, str | None):
        problem = "there is no 'prompt'" if value is None else f"`system` must be text, got {system!r:.60}"
        raise DataError(f"{row.place}: {problem}; columns: {sorted(row.fields)}.")
    prompt = read_text(value, place=row.place, field="prompt")
    return prompt if isinstance(prompt, str) and system is None else prompt_turns(prompt, system, row.place)
