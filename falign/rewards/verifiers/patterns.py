"""Patterns: a regular expression, or a sequence of tagged sections."""

import re
from collections.abc import Sequence
from typing import Any

from .answers import answer_text, last_match

__all__ = ["matches", "matches_answer", "sections"]


def matches(completion: str, *, pattern: str, whole: bool) -> float:
    """Return 1 if a pattern occurs, else 0.

    Args:
        completion: The text.
        pattern: See :func:`falign.rewards.regex`.
        whole: See :func:`falign.rewards.regex`.
    """
    return float((re.fullmatch if whole else re.search)(pattern, completion) is not None)


def matches_answer(completion: str, answer: Any, *, pattern: str, whole: bool) -> float:
    """Return 1 if a pattern's first group is the row's answer in its last match, else 0.

    Args:
        completion: The text.
        answer: A text or a number; white space at its ends does not count.
        pattern: It has a group.
        whole: See :func:`falign.rewards.regex`.

    Raises:
        RowError: The answer is missing or empty, or neither a text nor a number.
    """
    expected = answer_text(answer).strip()
    found = re.fullmatch(pattern, completion) if whole else last_match(pattern, completion)
    return float(found is not None and (found[1] or "").strip() == expected)


def sections(completion: str, tags: Sequence[str]) -> float:
    """Return 1 if a completion consists of non-empty sections ``<tag>…</tag>`` in this order, each once, else 0."""
    rest = completion.strip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if not rest.startswith(opening):
            return 0.0
        content, closed, rest = rest.removeprefix(opening).partition(closing)
        if not closed or not content.strip() or any(f"<{other}>" in content for other in tags):
            return 0.0
        rest = rest.lstrip()
    return float(not rest)
