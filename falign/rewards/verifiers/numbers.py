"""Numbers: the last one of a completion against the row's."""

import math
import re
from numbers import Real
from typing import Any

from . import RowError
from .marks import after_mark, last_match

__all__ = ["last_number", "score"]

# A sign counts where nothing stands before it, so that 10-5 holds 10 and 5. Digits after a point belong to what is
# before it (2.3.1 is no number 1).
NUMBER = re.compile(
    r"(?<![\w.])(?<!\d[.,])"
    r"(?P<sign>[-+−]?)\s?[$€£]?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?P<exponent>[eE][-+]?\d+)?"
)


def score(completion: str, answer: Any, *, tolerance: float = 1e-6) -> float:
    r"""Return 1 if the completion's number is the row's, else 0.

    Args:
        completion: Its last number counts, or the first after its last ``####`` or ``\boxed``.
        answer: A number, or a text read in the same way (``"#### 1,000"``).
        tolerance: Largest difference as a share of the answer; of 1 where that is 0.

    Raises:
        RowError: The answer holds no number.
    """
    expected = float(answer) if isinstance(answer, Real) and not isinstance(answer, bool) else last_number(str(answer))
    if expected is None or not math.isfinite(expected):
        raise RowError(f"the answer {str(answer)[:80]!r} holds no finite number")
    found = last_number(completion)
    return float(found is not None and abs(found - expected) <= tolerance * (abs(expected) or 1.0))


def last_number(text: str) -> float | None:
    """Return the number that a text answers with; None where it has none."""
    marked = after_mark(text)
    found = NUMBER.search(marked) if marked is not None else None
    if found is None:
        found = last_match(NUMBER, text)
    if found is None:
        return None
    sign = "-" if found["sign"] in ("-", "−") else ""
    return float(sign + found["digits"].replace(",", "") + (found["exponent"] or ""))
