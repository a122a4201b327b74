"""Scores from weighted words: a given word list, or the log-odds of words in labeled texts."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from falign.errors import DataError
from falign.json_lines import split_lines
from falign.rewards.identity import Identity

__all__ = ["Lexicon", "fit_lexicon", "read_labelled", "read_lexicon"]

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

    The weight of a word is ``log p(w|positive) - log p(w|negative)``, each ``(count + smoothing)`` normalised over the
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
    normaliser = {label: math.log(count.total() + smoothing * len(vocabulary)) for label, count in counts.items()}
    weights = {
        word: math.log(counts[True][word] + smoothing)
        - normaliser[True]
        - math.log(counts[False][word] + smoothing)
        + normaliser[False]
        for word in vocabulary
    }
    return Lexicon(weights, math.log(num_positive / (len(positive) - num_positive)), output)


def read_labelled(path: str | Path, *, positive: str) -> tuple[list[str], list[bool]]:
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
