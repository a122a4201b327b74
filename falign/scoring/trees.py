"""The unit of scoring: one prompt and its completions, as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["PromptTree", "token_rows"]


@dataclass(frozen=True)
class PromptTree:
    """One prompt and its K completions (2 for a pair, G for a group).

    Attributes:
        prompt_ids: Token ids of the prompt, shared by all completions.
        completion_ids: Token ids of each completion, every one with at least one token.
        preference: One value per completion, larger is preferred (a pair: 1 and 0); None without preferences.
        place: Where the row came from, for messages (``"pairs.jsonl:12"``).

    Raises:
        ValueError: If the prompt or a completion is empty, or preferences and completions differ in number.

    Example:
        >>> pair = PromptTree(prompt_ids=(5, 6), completion_ids=((7, 2), (8, 9, 2)), preference=(1.0, 0.0))
        >>> len(pair.completion_ids)
        2
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[tuple[int, ...], ...]
    preference: tuple[float, ...] | None = None
    place: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all completions."""
        return len(self.prompt_ids) + sum(map(len, self.completion_ids))

    @property
    def longest_path(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return len(self.prompt_ids) + max(map(len, self.completion_ids))

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(f"{self.place}: a prompt needs at least one token: its last one predicts the completion.")
        if not self.completion_ids or not all(self.completion_ids):
            raise ValueError(f"{self.place}: every completion needs at least one token.")
        if self.preference is not None and len(self.preference) != len(self.completion_ids):
            raise ValueError(
                f"{self.place}: {len(self.preference)} preference values for {len(self.completion_ids)} completions."
            )


def token_rows(trees: Iterable[PromptTree]) -> Iterator[tuple[str, Sequence[int]]]:
    """Return the token ids of each prompt with each of its completions, and the place that they are from.

    Args:
        trees: The prompts and completions.

    Returns:
        Pairs of a place and token ids, one for each completion.

    Example:
        >>> list(token_rows([PromptTree((5, 6), ((7, 2), (8,)), place="pairs.jsonl:1")]))
        [('pairs.jsonl:1', (5, 6, 7, 2)), ('pairs.jsonl:1', (5, 6, 8))]
    """
    return ((tree.place, (*tree.prompt_ids, *ids)) for tree in trees for ids in tree.completion_ids)
