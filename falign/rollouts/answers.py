"""Answers of a model to prompts, to inspect the effect of training."""

from collections.abc import Collection, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from falign.data.tokenization import encode_prompt
from falign.errors import ConfigError
from falign.models.tokenizers import pad_token_id
from falign.rollouts.base import SamplingParams
from falign.rollouts.transformers_engine import TransformersEngine

__all__ = ["Prompt", "answer", "require_random"]

Prompt = str | list[dict[str, str]]
"""Plain text, or turns with ``role`` and ``content``."""


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    chat: bool = True,
    stop_token_ids: Collection[int],
    num_completions: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Return completions of prompts as text, those of a prompt one after another.

    Args:
        model: A causal language model, with or without adapters; its mode is restored.
        tokenizer: The model's tokenizer.
        prompts: Plain texts, or conversations up to the turn to generate.
        chat: True to treat a plain text as a user's turn if there is a chat template; False continues the text.
        stop_token_ids: Ids that end a completion.
        num_completions: Completions per prompt.
        max_new_tokens: Length of the longest completion.
        temperature: 0 decodes greedily; otherwise samples from the whole vocabulary.
        seed: Seed of the sampling; the same seed gives the same answers. The global random state is not used.

    Raises:
        ConfigError: A prompt is empty, a conversation has no chat template, or several completions of a prompt would be
            equal because decoding is greedy.
        DataError: The chat template refuses a prompt or omits a part of it.
        RolloutError: A prompt leaves no room for the answer.
    """
    require_random(num_completions, temperature)
    if empty := [
        i for i, prompt in enumerate(prompts) if not _turns(prompt) or not _turns(prompt)[-1]["content"].strip()
    ]:
        raise ConfigError(f"Prompt {empty[0]} is empty: give some text.")
    params = SamplingParams(max_new_tokens, temperature=temperature, stop_token_ids=frozenset(stop_token_ids))
    engine = TransformersEngine(model, pad_token_id=pad_token_id(tokenizer))
    engine.publish(model, version=0)
    as_turns = chat and bool(tokenizer.chat_template)
    rows = [
        encode_prompt(_turns(prompt) if as_turns else prompt, tokenizer, f"prompt {number}")
        for number, prompt in enumerate(prompts)
    ]
    rollouts = engine.sample(rows, num_completions, params, version=0, seed=seed)
    texts = [tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True) for rollout in rollouts]
    return [str(text).strip() for text in texts]


def require_random(num_completions: int, temperature: float) -> None:
    """Refuse several greedy completions of one prompt.

    Raises:
        ConfigError: They would be equal, or there are none.
    """
    if num_completions < 1:
        raise ConfigError(f"num_completions={num_completions} must be at least 1.")
    if num_completions > 1 and temperature == 0:
        raise ConfigError(
            f"num_completions={num_completions} with temperature=0, at which all completions of a prompt are equal: "
            "raise it, to 1 for samples from the model itself."
        )


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
