"""n-grams of completions (texts or lists of tokens), and the share of distinct ones.

The module imports nothing heavy, so a training run can use it without evaluate.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

__all__ = ["Completion", "by_prompt", "distinct", "ngrams", "tokens"]

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


def distinct(completions: Iterable[Completion], n: int) -> float:
    """Return the share of distinct n-grams among all n-grams of some completions; 0 without n-grams.

    It falls with the number and the length of the completions: compare only if both are similar.

    Args:
        completions: Texts, split at white space, or lists of tokens.
        n: Length of the n-grams, in tokens.

    Returns:
        From 0 to 1; 1 if none occurs twice.

    Raises:
        ValueError: n is not positive.

    Source:
        Li et al. (arXiv:1510.03055), section 5.1.

    Example:
        >>> distinct(["a b a", "a b c"], 1), distinct([[5, 6, 5], [5, 6, 7]], 2)
        (0.5, 0.75)
    """
    grams = [gram for completion in completions for gram in ngrams(tokens(completion), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def by_prompt(completions: Sequence[Item], prompts: Iterable[Hashable] | None) -> list[list[Item]]:
    """Return the completions of each prompt; without prompts, all together.

    Args:
        completions: One or more.
        prompts: For each completion its prompt, or any key that is equal for completions of one prompt.

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
