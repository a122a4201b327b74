"""Numbers: compare the last number of a completion with the row's."""

import math
import re
from typing import Any

from . import RowError
from .answers import after_mark, answer_text, last_match

__all__ = ["last_number", "score"]

# Digits after a point belong to what is before it (2.3.1 does not contain the number 1).
NUMBER = re.compile(
    r"(?<![\w.])(?<!\d[.,])"
    r"(?P<sign>[-+−]?)\s?[$€£]?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?P<exponent>[eE][-+]?\d+)?"
)

# A minus behind one of these is an operator: the answer "0 - 4" holds 0 and 4, "= -4" and "5 - -4" hold -4. A line
# that begins "2) -4" is a numbered answer; a single letter is a variable where the minus stands apart, "x - 4".
OPERAND = re.compile(r"(?:[\d)\]}%!²³]|(?<![^\W\d_])[^\W\d_](?=[ \t]+$))[ \t]*$")
NUMBERED = re.compile(r"^[ \t]*\(?\w{1,2}\)[ \t]*$", re.MULTILINE)
EXPRESSION = re.compile(r"(?:[\d)][ \t]*[-+*/^×÷·−:][ \t]*[-+−]?[ \t]*\(?|[{^_])[ \t]*$")


def score(completion: str, answer: Any, *, tolerance: float) -> float:
    r"""Return 1 if the completion's number is the row's, else 0.

    Args:
        completion: Its last number counts, or the first after its last ``####`` or ``\boxed``.
        answer: A number, or a text read in the same way (``"#### 1,000"``).
        tolerance: See :func:`falign.rewards.number`.

    Raises:
        RowError: The answer is missing, holds no number, or is a calculation.
    """
    expected = _expected(answer_text(answer))
    found = last_number(completion)
    return float(found is not None and abs(found - expected) <= tolerance * (abs(expected) or 1.0))


def last_number(text: str) -> float | None:
    """Return the number that a text answers with; None if it has none."""
    found = _last_match(text)
    return None if found is None else _value(found)


def _expected(answer: str) -> float:
    found = _last_match(answer)
    value = math.nan if found is None else _value(found)
    if found is None or not math.isfinite(value):
        raise RowError(f"the answer {answer[:80]!r} holds no finite number")
    if EXPRESSION.search(found.string[: found.start("digits")]):
        raise RowError(
            f"the answer {answer[:80]!r} is a calculation or a fraction; write its value, or judge with math"
        )
    return value


def _last_match(text: str) -> re.Match[str] | None:
    marked = after_mark(text)
    found = NUMBER.search(marked) if marked is not None else None
    return last_match(NUMBER, text) if found is None else found


def _value(found: re.Match[str]) -> float:
    is_negative = found["sign"] in ("-", "−") and not _follows_operand(found)
    digits = found["digits"].replace(",", "") + (found["exponent"] or "")
    return -float(digits) if is_negative else float(digits)


def _follows_operand(found: re.Match[str]) -> bool:
    """Return whether a sign is an operator, by the text before it on its line."""
    before = found.string[: found.start()].rpartition("\n")[2]
    is_apart = found.string[found.end("sign")].isspace()
    operand = OPERAND.search(before)
    if operand is None or NUMBERED.match(before):
        return False
    return is_apart or not operand[0].strip()[-1].isalpha()
