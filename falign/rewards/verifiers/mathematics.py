"""Mathematics: compare the completion's last answer with the row's, as expressions, by math-verify."""

import logging
import re
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Symbol, preorder_traversal
from sympy.core.function import AppliedUndef

from . import RowError
from .answers import HASHES, answer_text, last_boxed

__all__ = ["score"]

# It warns that calls have no timeout; the process is killed at its deadline instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# Commands whose argument is text: its letters are not variables.
COMMAND = re.compile(r"\\(?:text|math|operatorname|mbox|begin|end)[a-z]*\*?\{[^{}]*\}|\\[A-Za-z]+")
SCIENTIFIC = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d{1,3}")
FUNCTIONS = frozenset({"arccos", "arcsin", "arctan", "cos", "cot", "csc", "exp", "ln", "pi", "sec"})
EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def score(completion: str, answer: Any, *, decimals: int) -> float:
    r"""Return 1 if the completion's answer equals the row's, else 0.

    Args:
        completion: Its answer is the content of its last ``\boxed``; else the text after its last ``####``; else its
            last formula or number; else its last line. A completion without a mark that ends with ``=`` is a question.
        answer: LaTeX, an expression, a number, a list of them, or a text whose answer follows ``####``.
        decimals: See :func:`falign.rewards.mathematics`.

    Raises:
        RowError: The answer is missing or not an expression, or has words that would be read as products of letters.
    """
    is_list = isinstance(answer, list | tuple) and len(answer) > 0
    expected = _expected(f"[{', '.join(map(answer_text, answer))}]" if is_list else answer_text(answer))
    marked = _marked(completion)
    if marked is None and completion.rstrip(" .?\n").endswith("="):
        return 0.0
    found = _parse(completion if marked is None else marked)
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
    if text.casefold() in ("n/a", "na"):
        raise RowError(f"the answer {text!r} means that the row has no answer; remove the row")
    if SCIENTIFIC.fullmatch(text):  # 1e-05 would be read as 1e minus 5
        text = f"{Decimal(text):f}"
    in_latex = any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
    parsed = _parse(text if in_latex else _in_a_box(text))
    # An answer that is parsed only as text would be compared as text, which is meant for LaTeX (\text) alone.
    if not parsed or ("\\" not in text and all(isinstance(each, str) for each in parsed)):
        raise RowError(f"the answer {text[:80]!r} holds no expression")
    if apart := re.search(r"\d\s+\d", COMMAND.sub("", text)):
        raise RowError(f"the answer {text[:80]!r} would be read as a product at {apart[0]!r}; write one number")
    if (word := _spelled(text, parsed)) is not None:
        raise RowError(
            f"the answer {text[:80]!r} would be read as a product of the letters of {word!r}; write "
            f"\\text{{{word}}}, or \\{word} for a function or constant, or remove the row"
        )
    return parsed


def _spelled(text: str, parsed: list[Any]) -> str | None:
    """Return a word that was read as a product of its letters, so that ``wrote`` would equal ``tower``."""
    names = "".join(str(symbol) for each in parsed if not isinstance(each, str) for symbol in _symbols(each)).lower()
    for word in re.findall(r"[A-Za-z]{2,}", COMMAND.sub(" ", text)):
        # Products of variables are written in the order of the alphabet, and words seldom are: xyz, abc.
        is_product = word not in FUNCTIONS and (len(word) == 2 or list(word) == sorted(set(word)))
        if not is_product and set(word.lower()) - {"e"} <= set(names):  # e is a number
            return word
    return None


def _symbols(expression: Any) -> Iterator[Any]:
    for node in preorder_traversal(expression):
        if isinstance(node, Symbol):
            yield node
        elif isinstance(node, AppliedUndef):
            yield node.func


def _in_a_box(text: str) -> str:
    return f"\\boxed{{{text}}}"


def _parse(text: str) -> list[Any]:
    return parse(text, extraction_config=EXTRACTION, parsing_timeout=0, raise_on_error=True)


# The tables of the grammar are built at the first use: here, because imports do not count against a deadline.
_parse(_in_a_box("1"))
