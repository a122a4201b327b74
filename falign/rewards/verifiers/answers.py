r"""Answers of rows as text, and marked answers of completions (``#### 42`` as in GSM8K, or ``\boxed{42}``)."""

import math
import re
from decimal import Decimal
from numbers import Real
from typing import Any

from . import RowError

__all__ = ["after_mark", "answer_text", "last_boxed", "last_match"]

HASHES, BOXED = "####", "\\boxed{"


def after_mark(text: str) -> str | None:
    """Return the text after the last mark; None if there is no mark."""
    begin = max((text.rfind(mark) + len(mark) for mark in (HASHES, BOXED) if mark in text), default=None)
    return None if begin is None else text[begin:]


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}``; None if there is none, or its braces are not closed."""
    begin = text.rfind(BOXED)
    if begin < 0:
        return None
    begin += len(BOXED)
    depth = 1
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)  # braces nest: \boxed{\frac{1}{2}}
        if depth == 0:
            return text[begin:i]
    return None


def last_match(pattern: str | re.Pattern[str], text: str, *, ignore_case: bool = False) -> re.Match[str] | None:
    """Return the last match of a pattern; None if there is none."""
    found = list(re.finditer(pattern, text, re.IGNORECASE if ignore_case else 0))
    return found[-1] if found else None


def answer_text(answer: Any) -> str:
    """Return a row's answer as text, numbers written out in full (0.00001, never 1e-05).

    Args:
        answer: A text or a finite number.

    Raises:
        RowError: It is missing, empty, NaN or infinite, or neither a text nor a number.
    """
    if answer is None:
        raise RowError("the answer is missing")
    if isinstance(answer, bool) or not isinstance(answer, str | Real | Decimal):
        raise RowError(f"the answer is a {type(answer).__name__}, {answer!r:.80}; it must be a text or a number")
    if isinstance(answer, str):
        if not answer.strip():
            raise RowError("the answer is empty")
        return answer
    if not math.isfinite(answer):
        raise RowError(f"the answer is {float(answer)}; it must be a finite number")
    return str(answer) if isinstance(answer, int) else f"{Decimal(repr(float(answer))):f}"
