"""Tokens and n-grams of completions that are texts or lists of tokens, and completions by prompt."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

__all__ = ["Completion", "by_prompt", "ngrams", "tokens"]

Completion = str | Sequence[Hashable]
Item = TypeVar("Item")


def tokens(completion: Completion) -> Sequence[Hashable]:
    """Return the words of a text, between white space, or the tokens as they are."""
    return completion.split() if isinstance(completion, str) else completion


def ngrams(sequence: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Return all n-grams of some tokens, in order, each as often as it occurs.

    Raises:
        ValueError: n is not positive.

    Example:
        >>> ngrams(["a", "b", "a"], 2)
        [('a', 'b'), ('b', 'a')]
    """
    if n < 1:
        raise ValueError(f"n={n}: an n-gram has 1 or more tokens.")
    return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]


def by_prompt(completions: Sequence[Item], prompts: Iterable[Hashable] | None) -> list[list[Item]]:
    """Return the completions of each prompt; without prompts, all together.

    Args:
        completions: One or more.
        prompts: For each completion its prompt, or anything that is equal for completions of one.

    Raises:
        ValueError: There are no completions, or not one prompt for each.
    """
    if len(completions) == 0:
        raise ValueError("There are no completions; give one or more.")
    if prompts is None:
        return [list(completions)]
    prompts = list(prompts)
    if len(prompts) != len(completions):
        raise ValueError(f"prompts has {len(prompts)} entries for {len(completions)} completions; give one for each.")
    groups: dict[Hashable, list[Item]] = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        groups.setdefault(prompt, []).append(completion)
    return list(groups.values())
