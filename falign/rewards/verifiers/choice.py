"""Multiple choice: compare the letter that a completion chooses with the row's."""

import re
from collections.abc import Sequence
from typing import Any

from . import RowError
from .answers import after_mark, answer_text, last_match

__all__ = ["chosen_letter", "score", "score_with_options"]


def score(completion: str, answer: Any, *, letters: str) -> float:
    r"""Return 1 if the completion chooses the row's letter, else 0; a completion that names two chooses none.

    Args:
        completion: Its last ``\boxed`` or ``####`` counts; else its last phrase like "answer is (C)"; else its last
            line, if that is a letter or begins with one as options do (``C)``).
        answer: The letter, in any case, with or without brackets.
        letters: See :func:`falign.rewards.choice`.

    Raises:
        RowError: The answer is missing, or not one of the letters.
    """
    expected = _expected(answer, letters)
    return float(chosen_letter(completion, letters=letters.upper()) == expected)


def score_with_options(completion: str, answer: Any, options: Any, *, letters: str) -> float:
    """Return the value of :func:`score`, but let a completion also end with the text of an option.

    Args:
        completion: As for :func:`score`; if it names no letter, its last line is compared with the options.
        answer: The letter.
        options: The options as texts, in the order of the letters.
        letters: See :func:`falign.rewards.choice`.

    Raises:
        RowError: The answer is missing or has no option, or the options are not a list of texts.
    """
    expected = _expected(answer, letters)
    if not isinstance(options, list | tuple) or not all(isinstance(option, str) for option in options):
        raise RowError(f"the options are {options!r:.80}; they must be a list of texts")
    if not letters.upper().index(expected) < len(options) <= len(letters):
        raise RowError(f"the answer is {expected}, and there are {len(options)} options for the letters {letters}")
    return float(chosen_letter(completion, letters=letters.upper(), options=options) == expected)


def _expected(answer: Any, letters: str) -> str:
    expected = answer_text(answer).strip().strip("().[]").upper()
    if len(expected) != 1 or expected not in letters.upper():
        raise RowError(f"the answer {answer!r:.80} is not one of the letters {letters}")
    return expected


def chosen_letter(completion: str, *, letters: str, options: Sequence[str] | None = None) -> str | None:
    """Return the letter that a completion chooses; None if it names none or several."""
    text = completion.strip()
    marked = after_mark(text)
    if marked is not None and (found := re.match(rf"\W*(?:\\text\{{)?\W*([{letters}])\b", marked)):
        return found[1]
    # A letter, perhaps in brackets or bold; not the beginning of a word with an apostrophe (A's).
    one = rf"[*\s(\[]*([{letters}])\b(?!['’])"
    # Only the words in any case: letters are capitals, or "the answer is a number" would choose A.
    before = (
        rf"(?i:\b(?:answer|ans|choice|option)\b\.?(?:\s+(?:choice|option))?(?:\s+(?:is|will be))?\W*(?:option)?){one}"
    )
    behind = rf"(?<!\w)([{letters}])\b[)\]*]*\s+(?i:is\s+(?:the\s+)?(?:correct|right|answer))"
    if (last := last_match(rf"{before}|{behind}", text)) is not None:
        # "The answer is A or B" and "A and B is correct" choose nothing.
        rest = text[last.end() :]
        several = re.match(rf"\W*(?:or|and|/|,)\W*[{letters}]\b", rest) or re.search(
            rf"\b[{letters}]\W*(?:or|and|/|,)\W*$", text[: last.start()]
        )
        return None if several else last[1] or last[2]
    line = text.splitlines()[-1].strip() if text else ""
    if found := re.fullmatch(rf"{one}[*\s)\].]*", line) or re.match(rf"[*\s(\[]*([{letters}])[)\].:]", line):
        return found[1]
    by_text = [letter for letter, option in zip(letters, options or (), strict=False) if _bare(option) == _bare(line)]
    return by_text[0] if len(by_text) == 1 else None


def _bare(option: str) -> str:
    return re.sub(r"^\W*[A-Za-z]\s*[).:]", "", option).strip(" .*").casefold()
