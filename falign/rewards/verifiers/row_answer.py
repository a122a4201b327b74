"""A row's answer as text, for verifiers."""

import math
from decimal import Decimal
from numbers import Real
from typing import Any

from . import RowError

__all__ = ["answer_text"]


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
