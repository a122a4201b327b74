"""Answers of a model to prompts, for a look at what training did."""

from collections.abc import Collection, Sequence

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from falign.errors import ConfigError
from falign.scoring import evaluation_mode

__all__ = ["Prompt", "answer"]

Prompt = str | list[dict[str, str]]
"""Plain text, or turns with ``role`` and ``content``."""


def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    stop_token_ids: Collection[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
) -> list[str]:
    """Return one completion per prompt, as text.

    Args:
        model: a causal language model, with or without adapters; back in its mode afterwards.
        tokenizer: the model's; a chat template, where it has one, renders each prompt as a user's turn.
        prompts: plain texts, or conversations up to the turn that is wanted.
        stop_token_ids: what ends a completion.
        max_new_tokens: longest completion.
        temperature: 0 decodes greedily; else samples from the whole vocabulary.
        seed: of the sampling; the same seed gives the same answers. The global random state is left alone.
        batch_size: prompts at a time.

    Raises:
        ConfigError: an empty prompt, or a conversation that the tokenizer has no chat template for.
    """
    if empty := [
        i for i, prompt in enumerate(prompts) if not _turns(prompt) or not _turns(prompt)[-1]["content"].strip()
    ]:
        raise ConfigError(f"Prompt {empty[0]} is empty: give some text.")
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0 if temperature > 0 else None,
        top_p=1.0 if temperature > 0 else None,
        eos_token_id=sorted(stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: list[str] = []
    with torch.no_grad(), evaluation_mode(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            answers += _answer_batch(model, tokenizer, prompts[start : start + batch_size], config)
    return answers


def _answer_batch(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], config: GenerationConfig
) -> list[str]:
    rows = [_token_ids(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, rows))
    device = next(model.parameters()).device
    # Left padding, so that every row continues at the same column; masked by position, never by value.
    input_ids = torch.tensor([[config.pad_token_id] * (longest - len(row)) + row for row in rows], device=device)
    attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)  # pyright: ignore
    return [text.strip() for text in tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]


def _token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise ConfigError("A prompt is a conversation, and the tokenizer has no chat template: give plain text.")
        return list(tokenizer(prompt)["input_ids"])
    try:
        text = str(tokenizer.apply_chat_template(_turns(prompt), tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        roles = " ".join(turn["role"] for turn in _turns(prompt))
        raise ConfigError(f"The chat template refuses the turns ({roles}) of a prompt: {error}.") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
