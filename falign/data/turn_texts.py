"""The texts within turns (content, reasoning, names and arguments of calls), and turns with other texts instead."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from falign.data.conversations import TOOL_CALLS, Message
from falign.data.tool_calls import REFERENCES, called_names, is_written

__all__ = ["Leaf", "changed_values", "leaves_of", "with_texts"]

_STRUCTURE = frozenset({"function", "name", "arguments"})
"""Keys of a call, which templates know by name; all other keys are names of arguments."""


class Leaf(NamedTuple):
    """A text within a turn.

    Attributes:
        turn: Number of the turn.
        text: The text.
        escaped: Whether a template may write it as in JSON, within quotation marks.
        repeats: Whether a template may write it again: the name of a function, beside its result.
    """

    turn: int
    text: str
    escaped: bool
    repeats: bool


def leaves_of(turns: Sequence[Message]) -> Iterator[Leaf]:
    """Yield every text of the turns that must be written, in the order in which :func:`with_texts` takes others.

    Example:
        >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a", "reasoning_content": "b"}]
        >>> [leaf.text for leaf in leaves_of(turns)]
        ['Hi', 'a', 'b']
    """
    called = called_names(turns)
    for number, turn in enumerate(turns):
        for key, value in turn.items():
            if _is_text(key, turn, called):
                escaped = key == TOOL_CALLS or (key == "content" and turn["role"] == "tool")
                names = called_names([turn]) if key == TOOL_CALLS else frozenset[str]()
                yield from (Leaf(number, text, escaped, text in names) for text in _texts_in(value))


def with_texts(turns: Sequence[Message], texts: Iterator[str]) -> list[Message]:
    """Return the turns with other texts in place of those of :func:`leaves_of`."""
    called = called_names(turns)
    return [
        {key: _replaced(value, texts) if _is_text(key, turn, called) else value for key, value in turn.items()}
        for turn in turns
    ]


def _is_text(key: str, turn: Message, called: Collection[str]) -> bool:
    return is_written(key, turn, called) and (key == TOOL_CALLS or isinstance(turn[key], str))


def _texts_in(value: Any, *, arguments: bool = False) -> Iterator[str]:
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not arguments and key in REFERENCES:
                continue
            if arguments or key not in _STRUCTURE:
                yield key
            yield from _texts_in(inner, arguments=arguments or key == "arguments")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts_in(inner, arguments=arguments)


def _replaced(value: Any, texts: Iterator[str], *, arguments: bool = False) -> Any:
    if isinstance(value, str):
        return next(texts) if value else value
    if isinstance(value, Mapping):
        found = {}
        for key, inner in value.items():
            if not arguments and key in REFERENCES:
                found[key] = inner
                continue
            name = next(texts) if arguments or key not in _STRUCTURE else key
            found[name] = _replaced(inner, texts, arguments=arguments or key == "arguments")
        return found
    if isinstance(value, list | tuple):
        return [_replaced(inner, texts, arguments=arguments) for inner in value]
    return value


def changed_values(value: Any, *, arguments: bool = False) -> Iterator[tuple[Any, Any]]:
    """Yield each number, boolean and null within calls, with the calls in which it is something else.

    Example:
        >>> list(changed_values([{"function": {"arguments": {"days": 3}}}]))
        [(3, [{'function': {'arguments': {'days': 'another value'}}}])]
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if arguments or key not in REFERENCES:
                found = changed_values(inner, arguments=arguments or key == "arguments")
                yield from ((own, {**value, key: changed}) for own, changed in found)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            found = changed_values(inner, arguments=arguments)
            yield from ((own, [*value[:i], changed, *value[i + 1 :]]) for own, changed in found)
    elif not isinstance(value, str):
        yield value, "another value"
