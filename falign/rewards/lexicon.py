"""Rewards of words: lexical constraints, and scores from weighted words."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from falign.errors import ConfigError, DataError, RewardError
from falign.json_lines import split_lines
from falign.rewards.base import column, place_of
from falign.rewards.identity import Identity

__all__ = ["Lexicon", "Words", "fit_lexicon", "read_labeled", "read_lexicon"]


WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class Lexicon:
    """The sum of the weights of a completion's words, ignoring case.

    Attributes:
        weights: By word, in lower case.
        bias: Value of a completion without any of the words.
        output: ``sum``: bias plus weights, each occurrence counting; ``mean``: their sum divided by the number of
            words; ``present``: 1 if one of the list occurs, else 0; ``probability``: the logistic function of ``sum``.
    """

    weights: Mapping[str, float]
    bias: float = 0.0
    output: Literal["sum", "mean", "present", "probability"] = "sum"

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        return [self.value(text) for text in completions]

    def identity(self) -> Identity:
        """Return this module and the fields."""
        return Identity(__name__, {"weights": dict(self.weights), "bias": self.bias, "output": self.output})

    def value(self, text: str) -> float:
        """Return the value of one text."""
        words = _words(text)
        if self.output == "present":
            return float(any(word in self.weights for word in words))
        total = self.bias + sum(self.weights.get(word, 0.0) for word in words)
        if self.output == "mean":
            return total / max(1, len(words))
        if self.output == "probability":
            return 0.5 * (1.0 + math.tanh(total / 2))
        return total


def read_lexicon(path: str | Path) -> dict[str, float]:
    """Return the weights in a file: one word per line, followed by a tab and its weight if that is not 1.

    Args:
        path: UTF-8; empty lines are skipped.

    Raises:
        DataError: A weight is not a finite number, an entry is not a single word or comes twice, or the file is empty.
    """
    weights: dict[str, float] = {}
    for n, line in enumerate(split_lines(Path(path).read_text(encoding="utf-8")), start=1):
        if not line.strip():
            continue
        word, _, weight = line.strip().casefold().partition("\t")
        if WORD.fullmatch(word) is None or word in weights:
            raise DataError(
                f"{path}:{n}: {word!r} is not a single word, or comes twice; give each word a line of its own."
            )
        try:
            weights[word] = float(weight or 1.0)
        except ValueError:
            weights[word] = math.nan
        if not math.isfinite(weights[word]):
            raise DataError(f"{path}:{n}: the weight {weight!r} is not a finite number; write word, tab, number.")
    if not weights:
        raise DataError(f"{path} has no words: write one per line.")
    return weights


def fit_lexicon(
    texts: Sequence[str],
    positive: Sequence[bool],
    *,
    smoothing: float = 1.0,
    output: Literal["sum", "mean", "present", "probability"] = "sum",
) -> Lexicon:
    """Return the naive Bayes classifier of labeled texts; its ``sum`` is the log-odds of the positive class.

    The weight of a word is ``log p(w|positive) - log p(w|negative)``, each ``(count + smoothing)`` normalized over the
    words that occur.

    Args:
        texts: Texts of both classes.
        positive: Their labels.
        smoothing: Added to every count, above 0.
        output: See :class:`Lexicon`.

    Raises:
        ValueError: A class is empty, the lengths differ, or ``smoothing`` is not above 0.
    """
    if not smoothing > 0:
        raise ValueError(f"smoothing={smoothing} must be above 0: a word of one class alone has infinite log-odds.")
    counts = {True: Counter[str](), False: Counter[str]()}
    for text, label in zip(texts, positive, strict=True):
        counts[bool(label)].update(_words(text))
    num_positive = sum(map(bool, positive))
    if num_positive in (0, len(positive)):
        raise ValueError("Both classes need texts: all labels are the same.")
    vocabulary = counts[True].keys() | counts[False].keys()
    normalizer = {label: math.log(count.total() + smoothing * len(vocabulary)) for label, count in counts.items()}
    weights = {
        word: math.log(counts[True][word] + smoothing)
        - normalizer[True]
        - math.log(counts[False][word] + smoothing)
        + normalizer[False]
        for word in vocabulary
    }
    return Lexicon(weights, math.log(num_positive / (len(positive) - num_positive)), output)


def read_labeled(path: str | Path, *, positive: str) -> tuple[list[str], list[bool]]:
    """Return texts and labels of a JSONL file (also ``.gz``) with the columns ``text`` and ``label``.

    Args:
        path: The file.
        positive: The label of the positive class; all others are negative.

    Raises:
        DataError: A row lacks a column, or no row has the label.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    texts, labels = [], []
    with opened(path, "rt", encoding="utf-8") as file:
        for n, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                texts.append(row["text"])
                labels.append(str(row["label"]) == positive)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}:{n}: {type(error).__name__}: {error}; write an object with text and label per line."
                ) from error
    if len(set(labels)) < 2:
        raise DataError(f"{path}: all or none of its rows have the label {positive!r}; give one of two classes.")
    return texts, labels


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


@dataclass(frozen=True)
class Words:
    """Presence of whole words (or phrases), ignoring case; ``cat`` is not in ``cats``.

    It runs in this process: its time is proportional to the text.

    Attributes:
        words: The words, if they are the same for all rows.
        column: The column with the words of each row: a list, or a text with white space between them.
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
