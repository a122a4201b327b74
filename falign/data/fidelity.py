"""Checks that rendered text contains every turn of its row once, in order and unchanged."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from falign.choices import shown
from falign.data.chat_template import NO_INPUTS, TemplateInputs, Tokenizer, apply_template, template_source
from falign.data.conversations import TOOL_CALLS, Message
from falign.data.tool_calls import FORMS, REFERENCES, as_form, called_names, is_written
from falign.data.turn_texts import Leaf, changed_values, leaves_of, with_texts
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
        spans: Start and end of each turn's content, reasoning and calls together, in ``compact(text)``.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def compact(text: str) -> str:
    """Return a text without white space, which templates and tokenizers trim and add."""
    return "".join(text.split())


def write(
    turns: Sequence[Message],
    tokenizer: Tokenizer,
    place: str,
    *,
    answered: bool,
    like: Written | None = None,
    inputs: TemplateInputs = NO_INPUTS,
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
        inputs: What the template reads besides the turns.

    Raises:
        ConfigError: The template is unusable.
        DataError: A turn, or a part or key of a turn, is left out, repeated or changed.
    """
    run = _Run(tokenizer, place, answered, inputs)
    if inputs.tools:
        _check_tools(turns, run)
    if not any(TOOL_CALLS in turn for turn in turns):
        return _written(turns, run, like)
    # Templates differ in how they read calls. The first form that they write whole is taken.
    refused: DataError | None = None
    for form in FORMS:
        try:
            return _written(as_form(turns, form), run, like)
        except DataError as error:
            refused = refused or error
    assert refused is not None
    raise refused


class _Run(NamedTuple):
    """A template with all that it reads but the turns."""

    tokenizer: Tokenizer
    place: str
    answered: bool
    inputs: TemplateInputs

    def __call__(self, turns: Sequence[Message]) -> str:
        return apply_template(turns, self.tokenizer, self.place, answered=self.answered, inputs=self.inputs)

    def writes(self, turns: Sequence[Message], text: str) -> bool:
        """Return whether the template writes a text for other turns; if it fails on them, it writes none."""
        try:
            return self(turns) == text
        except DataError:
            return False


def _written(turns: Sequence[Message], run: _Run, like: Written | None) -> Written:
    text = run(turns)
    small = compact(text)
    _check_keys(turns, text, run)
    if like is not None and (spans := _spans_beside(like, small, turns[-1])) is not None:
        return Written(text, spans)
    return Written(text, _checked_spans(turns, small, run))


def _spans_beside(like: Written, small: str, answer: Message) -> tuple[tuple[int, int], ...] | None:
    if answer.keys() != {"role", "content"}:
        return None
    other = compact(like.text)
    # If this text is the other one with only the answer exchanged, the spans before the answer are the same.
    start, end = like.spans[-1]
    content = compact(answer["content"])
    if small != other[:start] + content + other[end:]:
        return None
    return (*like.spans[:-1], (start, start + len(content)))


def _checked_spans(turns: Sequence[Message], small: str, run: _Run) -> tuple[tuple[int, int], ...]:
    # In the masked run every character is unique, so a missing, repeated or reordered one shows in `marks` alone.
    leaves = list(leaves_of(turns))
    mask = _Mask([leaf.text for leaf in leaves], _words(template_source(run.tokenizer)))
    seen = compact(run(with_texts(turns, iter(mask.contents))))
    contents = [compact(content) for content in mask.contents]
    for leaf, content in zip(leaves, mask.contents, strict=True):
        if lost := mask.lost(content, seen):
            raise DataError(
                f"{run.place}: the chat template leaves out {shown(lost)} of {_named(turns, leaf.turn)}; {_REMEDY}."
            )
    _check_order(leaves, contents, mask, seen, run.place)
    spans, position = [], 0
    for number in range(len(turns)):
        # The parts of a turn may stand in any order, the turns may not.
        own = [
            _found(leaf, content, seen, position, turns, run.place)
            for leaf, content in zip(leaves, mask.contents, strict=True)
            if leaf.turn == number
        ]
        start, position = (min(own)[0], max(end for _, end in own)) if own else (position, position)
        spans.append((start, position))
    # The template may also change text without moving it (case, escapes): then the two runs differ.
    restored = mask.restored(seen)
    if restored != small:
        at = _difference(restored, small)
        raise DataError(
            f"{run.place}: the chat template writes {shown(small[max(0, at - 10) : at + 40])} where the row has "
            f"{shown(restored[max(0, at - 10) : at + 40])}; {_REMEDY}."
        )
    return tuple((mask.position(seen, start), mask.position(seen, end)) for start, end in spans)


def _check_order(leaves: Sequence[Leaf], contents: Sequence[str], mask: _Mask, seen: str, place: str) -> None:
    owner = {mark: i for i, content in enumerate(contents) for mark in mask.marks(content)}
    written: list[list[str]] = [[] for _ in contents]
    turn = 0
    known = set[str]()
    for mark in mask.marks(seen):
        i = owner[mark]
        if leaves[i].repeats and mark in known:
            continue
        known.add(mark)
        written[i].append(mark)
        if leaves[i].turn < turn:
            written[i].append(mark)  # a turn after a later one
        turn = leaves[i].turn
    if any(found != mask.marks(content) for found, content in zip(written, contents, strict=True)):
        raise DataError(f"{place}: the chat template writes turns twice, or in another order than the row; {_REMEDY}.")


def _found(leaf: Leaf, content: str, seen: str, position: int, turns: Sequence[Message], place: str) -> tuple[int, int]:
    """Return where a text stands in the masked text."""
    for form in map(compact, [content, *([json.dumps(content, ensure_ascii=False)[1:-1]] if leaf.escaped else [])]):
        if (start := seen.find(form, position)) >= 0:
            return start, start + len(form)
    raise DataError(f"{place}: the chat template changes {_named(turns, leaf.turn)}, {shown(leaf.text)}; {_REMEDY}.")


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


def _check_keys(turns: Sequence[Message], text: str, run: _Run) -> None:
    """Refuse a key of a turn, or a value of a call, that the template does not read: it would be left out."""
    called = called_names(turns)
    for key in dict.fromkeys(key for turn in turns for key in turn if key not in {"role", "content", *REFERENCES}):
        if not any(is_written(key, turn, called) for turn in turns if key in turn):
            continue
        without = [{name: value for name, value in turn.items() if name != key} for turn in turns]
        if run.writes(without, text):
            value = next(turn[key] for turn in turns if key in turn)
            raise DataError(
                f"{run.place}: a turn has the key {key!r} ({shown(value)}), which the chat template does not read; "
                f"remove it, set ignore=[{key}] if it is not part of the text, or set model.chat_template."
            )
    for number, turn in enumerate(turns):
        for value, changed in changed_values(turn.get(TOOL_CALLS, [])):
            others = [*turns[:number], {**turn, TOOL_CALLS: changed}, *turns[number + 1 :]]
            if run.writes(others, text):
                raise DataError(
                    f"{run.place}: the chat template leaves out {value!r} of the calls of {_named(turns, number)}; "
                    f"{_REMEDY}."
                )


def _check_tools(turns: Sequence[Message], run: _Run) -> None:
    """Refuse tools of which the template leaves out a name or a description."""
    known = (template_source(run.tokenizer), json.dumps(run.inputs.arguments(), sort_keys=True, default=str))
    if known in _written_tools:
        return
    texts = list(_descriptions(run.inputs.tools))
    mask = _Mask(texts, _words(known[0]))
    tools = _redescribed(run.inputs.tools, iter(mask.contents))
    seen = run._replace(inputs=replace(run.inputs, tools=tools))(as_form(turns, FORMS[0]))
    for text, content in zip(texts, mask.contents, strict=True):
        if mask.lost(content, seen):
            raise DataError(
                f"{run.place}: the chat template leaves out {shown(text)} of the column 'tools'; set "
                "model.chat_template to one that writes tools, or ignore=[tools] if they are not part of the prompt."
            )
    _written_tools.add(known)


_written_tools: set[tuple[str, str]] = set()
"""Templates and the tools that they have written."""


def _descriptions(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, str) and value and key in _DESCRIBES:
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _descriptions(inner, name)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _descriptions(inner)


_DESCRIBES = frozenset({"name", "description"})


def _redescribed(value: Any, texts: Iterator[str], key: str = "") -> Any:
    if isinstance(value, str):
        return next(texts) if value and key in _DESCRIBES else value
    if isinstance(value, Mapping):
        return {name: _redescribed(inner, texts, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redescribed(inner, texts) for inner in value]
    return value


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
