"""Lexical constraints: words that a completion must have, or must not have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from falign.errors import ConfigError, RewardError
from falign.rewards.base import column, place_of
from falign.rewards.identity import Identity

__all__ = ["Words"]


@dataclass(frozen=True)
class Words:
    """Presence of whole words (or phrases), ignoring case; ``cat`` is not in ``cats``.

    It runs in this process: its time is proportional to the text.

    Attributes:
        words: The same for all rows; or
        column: the column that holds each row's, a list or a text with white space between them.
        mode: ``all``, ``any`` or ``none`` of them must occur, for 1 or 0; ``share`` is the share that occurs.

    Raises:
        ConfigError: Both or neither of ``words`` and ``column`` are given, or the mode is unknown.
    """

    words: Sequence[str] = ()
    column: str | None = None
    mode: str = "all"

    def __post_init__(self) -> None:
        if bool(self.words) == (self.column is not None):
            raise ConfigError("reward words: give either words, at least one, or the column that holds them.")
        if self.mode not in ("all", "any", "none", "share"):
            raise ConfigError(f"reward words: mode={self.mode!r} is unknown; choose all, any, none or share.")

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        if self.column is None:
            return [self._value(text, tuple(self.words)) for text in completions]
        places = columns.get("place")
        rows = column(columns, self.column, reward="words")
        values: list[float | None] = []
        for i, (text, row) in enumerate(zip(completions, rows, strict=True)):
            try:
                values.append(self._value(text, self._of_row(row)))
            except ValueError as error:
                raise RewardError(f"reward words, {place_of(places, i)}: {error}.") from error
        return values

    def row_errors(self, prompts: list[Any], **columns: list[Any]) -> list[str | None]:
        """Return for each row why its column does not hold words; None if it does.

        Raises:
            RewardError: The column is missing.
        """
        if self.column is None:
            return [None] * len(prompts)
        return [self._error(row) for row in column(columns, self.column, reward="words")]

    def _error(self, row: Any) -> str | None:
        try:
            self._of_row(row)
        except ValueError as error:
            return str(error)
        return None

    def identity(self) -> Identity:
        """Return this module and the fields."""
        return Identity(__name__, {"words": list(self.words), "column": self.column, "mode": self.mode})

    def _of_row(self, row: Any) -> tuple[str, ...]:
        words = tuple(row.split()) if isinstance(row, str) else tuple(row) if isinstance(row, Sequence) else ()
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"column {self.column!r} is {row!r:.80}; it must hold words, at least one")
        return words

    def _value(self, text: str, words: tuple[str, ...]) -> float:
        found = sum(_pattern(word).search(text) is not None for word in words)
        if self.mode == "share":
            return found / len(words)
        return float({"all": found == len(words), "any": found > 0, "none": found == 0}[self.mode])


@lru_cache(maxsize=4096)
def _pattern(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE)
