"""Form: a regular expression, or sections between tags."""

import re
from collections.abc import Sequence
from typing import Any

from .marks import last_match

__all__ = ["matches", "sections"]


def matches(completion: str, pattern: str, *, whole: bool = False, answer: Any = None) -> float:
    """Return 1 if a pattern occurs, else 0.

    Args:
        completion: The text.
        pattern: A regular expression of Python's; flags go inside (``(?s)``).
        whole: Whether it must match the whole completion, not a part of it.
        answer: What its first group must be in its last match, white space at the ends aside; None for anything.
    """
    if answer is None:
        return float((re.fullmatch if whole else re.search)(pattern, completion) is not None)
    found = re.fullmatch(pattern, completion) if whole else last_match(pattern, completion)
    return float(found is not None and (found[1] or "").strip() == str(answer).strip())


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
