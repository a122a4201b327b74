r"""Where a text marks its answer: ``#### 42``, as GSM8K does, or ``\boxed{42}``."""

import re

__all__ = ["after_mark", "last_boxed", "last_match"]

HASHES, BOXED = "####", "\\boxed{"


def after_mark(text: str) -> str | None:
    """Return what follows the last mark, to the end of the text; None where there is none."""
    begin = max((text.rfind(mark) + len(mark) for mark in (HASHES, BOXED) if mark in text), default=None)
    return None if begin is None else text[begin:]


def last_boxed(text: str) -> str | None:
    r"""Return what the braces of the last ``\boxed`` hold; None where there is none, or it is not closed."""
    begin = text.rfind(BOXED)
    if begin < 0:
        return None
    begin += len(BOXED)
    depth = 1
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i]
    return None


def last_match(pattern: str | re.Pattern[str], text: str, *, ignore_case: bool = False) -> re.Match[str] | None:
    """Return the last place where a pattern occurs."""
    found = list(re.finditer(pattern, text, re.IGNORECASE if ignore_case else 0))
    return found[-1] if found else None
