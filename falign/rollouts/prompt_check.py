"""What every engine refuses before it samples."""

from __future__ import annotations

from collections.abc import Sequence

from falign.errors import RolloutError
from falign.rollouts.base import SamplingParams

__all__ = ["check_prompts", "check_request"]


def check_request(prompt_ids: Sequence[Sequence[int]], n: int, seed: int | list[int]) -> None:
    """Refuse a call that asks for nothing, or has not one seed for each prompt.

    Raises:
        RolloutError: With the number.
    """
    if n < 1:
        raise RolloutError(f"n={n}: at least 1 completion per prompt is drawn.")
    if not isinstance(seed, int) and len(seed) != len(prompt_ids):
        raise RolloutError(f"{len(seed)} seeds for {len(prompt_ids)} prompts: give one, or one for each prompt.")


def check_prompts(
    prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, vocabulary: int, positions: int | None
) -> None:
    """Refuse prompts that the model cannot read, or that leave no room for a completion.

    Args:
        prompt_ids: Token ids of each prompt.
        params: How long completions may be.
        vocabulary: Tokens of the model.
        positions: Of the model; None where nothing bounds them.

    Raises:
        RolloutError: With the prompt.
    """
    for i, prompt in enumerate(prompt_ids):
        if not prompt:
            raise RolloutError(f"Prompt {i} is empty: give at least one token, which predicts the first one drawn.")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise RolloutError(
                f"Prompt {i} has the token ids {min(prompt)} to {max(prompt)}, and the model {vocabulary} tokens: "
                "encode it with the model's own tokenizer."
            )
        if positions is not None and len(prompt) + params.max_new_tokens > positions:
            raise RolloutError(
                f"Prompt {i} has {len(prompt)} tokens, which with max_new_tokens={params.max_new_tokens} is more "
                f"than the {positions} positions of the model: shorten the prompt to "
                f"{max(positions - params.max_new_tokens, 0)}, or lower max_new_tokens."
            )
