"""Mathematics: the completion's last answer against the row's, as expressions, by math-verify."""

import logging
from decimal import Decimal
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from . import RowError
from .marks import HASHES, last_boxed

__all__ = ["score"]

# It recommends its own alarm signals, whose place the killable process has taken.
logging.getLogger("math_verify").setLevel(logging.ERROR)

EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def score(completion: str, answer: Any, *, decimals: int = 6) -> float:
    r"""Return 1 if the completion's answer equals the row's, else 0.

    Args:
        completion: Its last ``\boxed``, or else what follows its last ``####``, its last formula or
            number, or its last line, is its answer.
        answer: LaTeX, an expression, a number, or a text whose answer follows ``####``.
        decimals: Digits after the point to which numbers must agree.

    Raises:
        RowError: The answer is no expression.
    """
    # Numbers in full: 1e-05 would be read as 1e minus 5.
    number = isinstance(answer, int | float) and not isinstance(answer, bool)
    expected = _expected(f"{Decimal(repr(answer)):f}" if number else str(answer))
    found = _parse(completion) if (marked := _marked(completion)) is None else _parse(marked)
    if not found:
        found = _parse(_in_a_box(completion.rstrip(" .\n").rpartition("\n")[2]))
    return float(verify(expected, found, float_rounding=decimals, timeout_seconds=None, raise_on_error=True))


def _marked(completion: str) -> str | None:
    boxed = last_boxed(completion)
    if boxed is not None:
        return _in_a_box(boxed)
    return completion.rpartition(HASHES)[2] if HASHES in completion else None


@lru_cache(maxsize=256)  # one row has many completions
def _expected(answer: str) -> list[Any]:
    text = answer.rpartition(HASHES)[2].strip()
    if "\n" in text:
        raise RowError(f"the answer {text[:80]!r} has several lines; mark its end with {HASHES}")
    in_latex = any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
    parsed = _parse(text if in_latex else _in_a_box(text))
    if not parsed:
        raise RowError(f"the answer {text[:80]!r} holds no expression")
    return parsed


def _in_a_box(text: str) -> str:
    return f"\\boxed{{{text}}}"


def _parse(text: str) -> list[Any]:
    return parse(text, extraction_config=EXTRACTION, parsing_timeout=0, raise_on_error=True)


# The grammar's tables are built at the first use: now, at import, which no completion's deadline pays for.
_parse(_in_a_box("1"))
