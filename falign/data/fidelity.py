"""Checks that rendered text contains every turn of its row once, in order and unchanged."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from falign.choices import shown
from falign.data.chat_template import Tokenizer, apply_template, template_source
from falign.data.conversations import Message
from falign.errors import DataError

__all__ = ["Written", "check_decoded", "compact", "write"]

_REMEDY = "correct the row, or set model.chat_template to a template that writes every turn unchanged"
_PRIVATE = "".join(map(chr, (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))))
"""Code points for private use, which rarely occur in texts."""

_PRIVATE_SET = frozenset(_PRIVATE)  # so that looking for them takes time only for the characters of a row


class Written(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: The text that the template wrote.
        spans: Start and end of each turn's content in ``compact(text)``.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def compact(text: str) -> str:
    """Return a text without white space, which templates and tokenizers trim and add."""
    return "".join(text.split())


def write(
    turns: Sequence[Message], tokenizer: Tokenizer, place: str, *, answered: bool, like: Written | None = None
) -> Written:
    """Render a conversation, and check that the text is that of the row, ignoring white space.

    The template is run twice: on the turns, and on the turns with each character of a word replaced by a unique private
    code point. The second text shows where each character went, however short or common a turn is. The first text must
    equal the second with the original characters restored; otherwise the template changed something.

    Words that occur in the template itself (``think``, ``system``) are not replaced, because it may look for them.

    Args:
        turns: The conversation.
        tokenizer: A tokenizer with a chat template.
        place: The row, for messages.
        answered: Whether the last turn is the answer; otherwise the generation prompt comes last.
        like: The same conversation with another answer, already checked. If the two differ only in the answer, the
            second run is skipped.

    Raises:
        ConfigError: The template is unusable.
        DataError: A turn, or a part or key of a turn, is left out, repeated or changed.
    """
    text = apply_template(turns, tokenizer, place, answered=answered)
    small = compact(text)
    if like is not None and (spans := _spans_beside(like, small, turns[-1])) is not None:
        written = Written(text, spans)
    else:
        written = Written(text, _checked_spans(turns, small, tokenizer, place, answered=answered))
    _check_keys(turns, text, tokenizer, place, answered=answered)
    return written


def _spans_beside(like: Written, small: str, answer: Message) -> tuple[tuple[int, int], ...] | None:
    other = compact(like.text)
    # If this text is the other one with only the answer exchanged, the spans before the answer are the same.
    start, end = like.spans[-1]
    content = compact(answer["content"])
    if small != other[:start] + content + other[end:]:
        return None
    return (*like.spans[:-1], (start, start + len(content)))


def _checked_spans(
    turns: Sequence[Message], small: str, tokenizer: Tokenizer, place: str, *, answered: bool
) -> tuple[tuple[int, int], ...]:
    # In the masked run every character is unique, so a missing, repeated or reordered one shows in `marks` alone.
    mask = _Mask([turn["content"] for turn in turns], _words(template_source(tokenizer)))
    others = [{**turn, "content": content} for turn, content in zip(turns, mask.contents, strict=True)]
    seen = compact(apply_template(others, tokenizer, place, answered=answered))
    contents = [compact(content) for content in mask.contents]
    if mask.marks(seen) != mask.marks("".join(contents)):
        for number, content in enumerate(mask.contents):
            if lost := mask.lost(content, seen):
                raise DataError(
                    f"{place}: the chat template leaves out {shown(lost)} of {_named(turns, number)}; {_REMEDY}."
                )
        raise DataError(f"{place}: the chat template writes turns twice, or in another order than the row; {_REMEDY}.")
    spans, position = [], 0
    for number, content in enumerate(contents):
        start = seen.find(content, position)
        if start < 0:
            raise DataError(
                f"{place}: the chat template changes {_named(turns, number)}, {shown(turns[number]['content'])}; "
                f"{_REMEDY}."
            )
        position = start + len(content)
        spans.append((start, position))
    # The template may also change text without moving it (case, escapes): then the two runs differ.
    restored = mask.restored(seen)
    if restored != small:
        at = _difference(restored, small)
        raise DataError(
            f"{place}: the chat template writes {shown(small[max(0, at - 10) : at + 40])} where the row has "
            f"{shown(restored[max(0, at - 10) : at + 40])}; {_REMEDY}."
        )
    return tuple((mask.position(seen, start), mask.position(seen, end)) for start, end in spans)


def _named(turns: Sequence[Message], number: int) -> str:
    return f"turn {number + 1} ({turns[number]['role']})"


def _difference(first: str, second: str) -> int:
    """Return the first position at which two texts differ."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


class _Mask:
    """Texts in which each character of a word is replaced by a unique private code point.

    A text without such a word gets one code point at its end.

    Args:
        contents: The texts.
        kept: Words that stay as they are, in lower case.

    Attributes:
        contents: The texts, masked.
        stands_for: The original character of each code point; empty for one that was added.
    """

    def __init__(self, contents: Sequence[str], kept: frozenset[str]) -> None:
        used = set().union(*contents)
        free = _PRIVATE if _PRIVATE_SET.isdisjoint(used) else "".join(c for c in _PRIVATE if c not in used)
        self.stands_for: dict[str, str] = {}
        self.contents: list[str] = []
        taken = 0

        def marks(match: re.Match[str]) -> str:
            nonlocal taken
            word = match[0]
            if word.lower() in kept:
                return word
            mask = free[taken : taken + len(word)]
            taken += len(mask)
            self.stands_for.update(zip(mask, word, strict=False))
            return mask + word[len(mask) :]

        for content in contents:
            before = taken
            text = re.sub(r"\w+", marks, content)
            if taken == before and taken < len(free):
                self.stands_for[free[taken]] = ""
                text += free[taken]
                taken += 1
            self.contents.append(text)
        self._table = str.maketrans(self.stands_for)
        self._added = [mark for mark, character in self.stands_for.items() if not character]

    def marks(self, text: str) -> list[str]:
        """Return the code points of a text that stand for characters, in order."""
        return [character for character in text if character in self.stands_for]

    def restored(self, text: str) -> str:
        """Return a text with the original characters restored."""
        return text.translate(self._table)

    def position(self, text: str, position: int) -> int:
        """Convert a position in a masked text to the position in the restored text."""
        return position - sum(text.count(mark, 0, position) for mark in self._added)

    def lost(self, content: str, seen: str) -> str:
        """Return the first part of a masked content that is missing from a text; empty if nothing is missing."""
        missing = set(content) & self.stands_for.keys() - set(seen)
        if not missing:
            return ""
        start = next(i for i, c in enumerate(content) if c in missing)
        there = (i for i in range(start, len(content)) if content[i] in self.stands_for and content[i] not in missing)
        return self.restored(content[start : next(there, len(content))]).strip() or self.restored(content)


@lru_cache(maxsize=16)
def _words(template: str) -> frozenset[str]:
    return frozenset(word.lower() for word in re.findall(r"\w+", template))


def _check_keys(turns: Sequence[Message], text: str, tokenizer: Tokenizer, place: str, *, answered: bool) -> None:
    """Refuse a key of a turn that the template does not read: its value would be left out."""
    for key in dict.fromkeys(key for turn in turns for key in turn if key not in ("role", "content")):
        without = [{name: value for name, value in turn.items() if name != key} for turn in turns]
        if apply_template(without, tokenizer, place, answered=answered) == text:
            value = next(turn[key] for turn in turns if key in turn)
            raise DataError(
                f"{place}: a turn has the key {key!r} ({shown(value)}), which the chat template does not read; remove "
                f"it, set ignore=[{key}] if it is not part of the text, or set model.chat_template."
            )


def check_decoded(text: str, ids: Sequence[int], decode: Callable[[list[int]], str], place: str) -> None:
    """Refuse a text that its tokens do not decode to, because the tokenizer lacks some of its characters.

    Case, accents, compatible characters and white space may differ: tokenizers normalize them.

    Raises:
        DataError: The decoded text differs; the message shows where.
    """
    decoded = str(decode(list(ids)))
    if decoded == text or compact(decoded) == compact(text):
        return
    want, found = _plain(text), _plain(decoded)
    if want != found:
        at = _difference(want, found)
        raise DataError(
            f"{place}: the tokenizer has no tokens for {shown(want[max(0, at - 5) : at + 20])}: its tokens decode to "
            f"{shown(found[max(0, at - 5) : at + 20])}; correct the row, or use a model whose tokenizer has them."
        )


def _plain(text: str) -> str:
    # SentencePiece writes white space as U+2581; case, accents and compatible characters may be normalized.
    decomposed = unicodedata.normalize("NFKD", text.casefold().replace("\u2581", " "))
    return compact("".join(c for c in decomposed if unicodedata.category(c) not in ("Mn", "Cf", "Cc"))).casefold()
