"""The token window of a run: maximum lengths, and the policies for longer rows."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from falign.choices import require_choice
from falign.errors import ConfigError, DataError
from falign.scoring.batch import PromptTree

__all__ = ["Fitted", "LengthPolicy", "Window", "cut_left", "fit"]

LengthPolicy = Literal["error", "cut", "drop"]


@dataclass(frozen=True)
class Window:
    """Maximum lengths in tokens, and the policies for longer rows.

    Attributes:
        max_length: Maximum of prompt and longest completion together.
        max_completion_length: Maximum of a completion, and the room that a prompt must leave for one.
            None: completions may use all that the prompt leaves, and it must leave half of the window.
        long_prompt: A prompt that leaves too little room stops the run, is cut from the left, or drops the row.
        long_completion: A completion without room is cut at its end, drops the row, or stops the run.
            A cut completion does not end, so it has no stop token.
    """

    max_length: int
    max_completion_length: int | None = None
    long_prompt: LengthPolicy = "error"
    long_completion: LengthPolicy = "cut"

    def __post_init__(self) -> None:
        require_choice("long_prompt", self.long_prompt, LengthPolicy)
        require_choice("long_completion", self.long_completion, LengthPolicy)
        if self.max_length < 2:
            raise ConfigError(f"max_length={self.max_length} must be at least 2: one prompt and one completion token.")
        if self.max_completion_length is not None and not 0 < self.max_completion_length < self.max_length:
            raise ConfigError(
                f"max_completion_length={self.max_completion_length} must lie between 1 and max_length - 1 = "
                f"{self.max_length - 1}, or the prompt has no room."
            )

    def prompt_room(self, longest_completion: int) -> int:
        """Return how many prompt tokens fit beside completions of at most ``longest_completion`` tokens."""
        reserved = self.max_completion_length or self.max_length // 2
        return self.max_length - min(longest_completion, reserved)

    def completion_room(self, prompt_length: int) -> int:
        """Return how many tokens a completion may have after such a prompt."""
        return min(self.max_length - prompt_length, self.max_completion_length or sys.maxsize)


class Fitted(NamedTuple):
    """A tree that fits, and the cuts; if the row is dropped, ``tree`` is None and ``dropped`` is the reason."""

    tree: PromptTree | None
    prompt_tokens_cut: int = 0
    completions_cut: int = 0
    dropped: str | None = None


def fit(tree: PromptTree, window: Window, *, bos_token_id: int | None) -> Fitted:
    """Cut or drop a tree that is longer than the window; all completions keep the same prompt.

    Args:
        tree: The tree, of any length.
        window: The lengths and policies.
        bos_token_id: A BOS token that stays first when a prompt that begins with it is cut.

    Raises:
        DataError: A prompt or completion is too long, and its policy is ``"error"``.
    """
    longest = max(len(ids) for ids in tree.completion_ids)
    prompt_room = window.prompt_room(longest)
    prompt_excess = max(0, len(tree.prompt_ids) - prompt_room)
    if prompt_excess and window.long_prompt == "error":
        raise DataError(
            f"{tree.place}: the prompt has {len(tree.prompt_ids)} tokens and the longest completion {longest}; "
            f"in max_length={window.max_length} the prompt may have {prompt_room}. Raise `max_length`; "
            "a run can also lower `max_completion_length`, or set `long_prompt` to cut (from the left) or drop."
        )
    if prompt_excess and window.long_prompt == "drop":
        return Fitted(None, dropped="long prompt")
    prompt_ids = cut_left(tree.prompt_ids, prompt_room, bos_token_id) if prompt_excess else tree.prompt_ids

    completion_room = window.completion_room(len(prompt_ids))
    completions_cut = sum(len(ids) > completion_room for ids in tree.completion_ids)
    if completions_cut and window.long_completion == "error":
        raise DataError(
            f"{tree.place}: the longest completion has {longest} tokens, and after a prompt of {len(prompt_ids)} "
            f"there is room for {completion_room}. Raise `max_length`; "
            "a run can also raise `max_completion_length`, or set `long_completion` to cut or drop."
        )
    if completions_cut and window.long_completion == "drop":
        return Fitted(None, dropped="long completion")
    completion_ids = tuple(ids[:completion_room] for ids in tree.completion_ids)
    if completions_cut and _indistinct(tree, completion_ids):
        return Fitted(None, dropped="equal after the cut")
    weights = tree.token_weights
    if weights is not None:
        weights = tuple(own[:completion_room] for own in weights)
    counted = tree.counted
    if counted is not None:
        counted = tuple(own[:completion_room] for own in counted)
        if not all(map(any, counted)):
            return Fitted(None, dropped="no answer before the cut")
    fitted = replace(tree, prompt_ids=prompt_ids, completion_ids=completion_ids, token_weights=weights, counted=counted)
    return Fitted(fitted, prompt_excess, completions_cut)


def cut_left(ids: tuple[int, ...], room: int, bos_token_id: int | None) -> tuple[int, ...]:
    """Return the last ``room`` tokens; a leading BOS is kept as the first of them."""
    if room > 1 and ids[0] == bos_token_id:
        return (ids[0], *ids[len(ids) - room + 1 :])
    return ids[len(ids) - room :]


def _indistinct(tree: PromptTree, completion_ids: tuple[tuple[int, ...], ...]) -> bool:
    """Return whether two completions of different preference have become the same tokens."""
    if tree.preference is None:
        return False
    preferences: dict[tuple[int, ...], float] = {}  # setdefault returns the preference of an earlier equal completion
    pairs = zip(completion_ids, tree.preference, strict=True)
    return any(preferences.setdefault(ids, value) != value for ids, value in pairs)
