"""Completions of single prompts by a run or a model, to inspect what it has learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falign.data import Row, Text, read_rows
from falign.data.conversations import read_text
from falign.data.examples import prompt_turns
from falign.errors import ConfigError, DataError
from falign.json_lines import split_lines
from falign.runs.loading import Named, chat_of_run, is_run, named, opened

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
        dtype: Data type of a model; a run has its own.
        trust_code: Whether code that a run folder names may run.

    Raises:
        FalignError: The run or model is missing or damaged, or ``dtype`` is given for a run.
    """
    import torch

    from falign.models import load_model, load_tokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = named(model)[0]
    if is_run(name):
        if dtype != "auto":
            raise ConfigError(f"`dtype`: {name} is a run, which has its own (model.dtype): leave it out.")
        run = opened(model, trust_code=trust_code)
        run.policy.to(device)  # pyright: ignore[reportArgumentType]
        return run.policy, run.tokenizer
    return load_model(name, dtype=dtype, device=device), load_tokenizer(name)


def sample(
    model: Named,
    prompts: str | Sequence[Text],
    *,
    chat: bool | None = None,
    num_completions: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "auto",
    trust_code: bool = False,
) -> list[str]:
    """Return completions of prompts, those of a prompt one after another.

    To write them to a file, with rewards, use :func:`falign.write_samples`.

    Args:
        model: A run, or any model.
        prompts: One text, or a list of texts and conversations (lists of turns).
        chat: Whether plain texts are a user's turns; by default as in the run, or if there is a chat template.
        num_completions: Completions per prompt; several need a temperature above 0.
        max_new_tokens: Maximum length of a completion, in tokens.
        temperature: 0 decodes greedily.
        seed: Seed of the sampling.
        dtype: Data type of a model; a run has its own.
        trust_code: Whether code that a run folder names may run.

    Raises:
        ConfigError: There is no prompt, no such run, `dtype` is given for a run, or several completions would be equal.
        DataError: A prompt is neither text nor a conversation.
        ModelError: The model is missing or damaged.
        RolloutError: A prompt leaves no room for a completion.
    """
    from falign.models import base_of, stop_token_ids
    from falign.rollouts.answers import answer, require_random

    require_random(num_completions, temperature)
    if not prompts:
        raise ConfigError("prompts is empty: give at least one.")
    prompts = [prompts] if isinstance(prompts, str) else _read(prompts)
    policy, tokenizer = load_named(model, dtype=dtype, trust_code=trust_code)
    chat = chat_of_run(named(model)[0]) if chat is None else chat
    return answer(
        policy,
        tokenizer,
        prompts,
        chat=chat is not False,
        stop_token_ids=stop_token_ids(base_of(policy), tokenizer),
        num_completions=num_completions,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )


def _read(prompts: Any) -> list[Text]:
    """Return prompts of a program: texts, and conversations as rows of data have them."""
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Sequence):
        raise ConfigError(f"prompts is a {type(prompts).__name__}: give a text, or a list of texts and conversations.")
    if any(isinstance(each, Mapping) for each in prompts):
        raise ConfigError(
            "prompts has a mapping: give a list of texts and conversations, each of which is a list of turns: "
            "[[{'role': 'user', 'content': ...}]]."
        )
    return [read_text(each, place=f"prompt {number}", field="prompt") for number, each in enumerate(prompts)]


def read_prompts(file: Path) -> list[Text]:
    """Return the prompts of a file: one per line (.txt), or rows whose ``prompt`` is text or turns.

    Raises:
        DataError: The file is missing, or a row has no prompt.
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
        problem = "'prompt' is missing" if value is None else f"`system` must be text, got {system!r:.60}"
        raise DataError(f"{row.place}: {problem}; columns: {sorted(row.fields)}.")
    prompt = read_text(value, place=row.place, field="prompt")
    return prompt if isinstance(prompt, str) and system is None else prompt_turns(prompt, system, row.place)
