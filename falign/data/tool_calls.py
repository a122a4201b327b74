"""Tool calls of assistant turns, and the forms in which chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from falign.choices import shown
from falign.data.text_values import is_blank, parsed_list
from falign.errors import DataError

__all__ = ["FORMS", "REFERENCES", "as_form", "called_names", "is_written", "read_tool_calls"]

REFERENCES = frozenset({"id", "type", "index", "tool_call_id"})
"""Keys that connect calls with their results; a template need not write them."""

FORMS: tuple[tuple[bool, bool], ...] = ((False, False), (True, False), (False, True), (True, True))
"""Forms in which templates read turns with calls: whether an empty content is null, and arguments are JSON texts."""


def read_tool_calls(value: Any, *, place: str, field: str) -> list[dict[str, Any]]:
    """Return the calls of a turn in one form, with arguments as objects.

    Args:
        value: A list of calls as OpenAI writes them, ``{"type": "function", "function": {"name", "arguments"}}``, with
            arguments as an object or as its JSON text; or of ``{"name", "arguments"}``. Also the JSON text of a list.
        place: The row, for messages.
        field: The turn, for messages.

    Raises:
        DataError: The value is something else.

    Example:
        >>> read_tool_calls([{"name": "add", "arguments": '{"a": 1}'}], place="x:1", field="chosen[0]")
        [{'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1}}}]
    """
    calls = parsed_list(value)
    if not isinstance(calls, list):
        raise DataError(f"{place}: 'tool_calls' of {field!r} is {shown(value)}; it must be a list of calls.")
    return [_read_call(call, f"{place}: 'tool_calls[{i}]' of {field!r}") for i, call in enumerate(calls)]


def _read_call(call: Any, place: str) -> dict[str, Any]:
    form = "{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}"
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise DataError(f"{place} is {shown(call)}; it must be {form}.")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise DataError(f"{place} has arguments that are not JSON ({error}): {shown(arguments)}.") from error
    if is_blank(arguments):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise DataError(f"{place} has the arguments {shown(arguments)}; they must be an object of names and values.")
    if call.get("type", "function") not in ("function", None):
        raise DataError(f"{place} has the type {shown(call['type'])}; only calls of functions are supported.")
    known = {"name", "arguments"} | (REFERENCES if function is call else set())
    further = [key for key in function if key not in known and not is_blank(function[key])]
    further += [key for key in call if key not in {"function", *REFERENCES, *known} and not is_blank(call[key])]
    if further:
        raise DataError(f"{place} has the key {further[0]!r}, which no template reads; it must be {form}.")
    others = {key: call[key] for key in ("id", "index") if not is_blank(call.get(key))}
    return {**others, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def called_names(turns: Sequence[dict[str, Any]]) -> frozenset[str]:
    """Return the names of the functions that turns call."""
    return frozenset(call["function"]["name"] for turn in turns for call in turn.get("tool_calls", ()))


def is_written(key: str, turn: Mapping[str, Any], called: Collection[str]) -> bool:
    """Return whether a template must write the value of a key of a turn.

    Args:
        key: A key of the turn.
        turn: The turn.
        called: Names of all functions that the conversation calls.
    """
    # The name in a tool's turn repeats that of the call.
    return key not in {"role", *REFERENCES} and not (key == "name" and turn["role"] == "tool" and turn[key] in called)


def as_form(turns: Sequence[dict[str, Any]], form: tuple[bool, bool]) -> list[dict[str, Any]]:
    """Return turns in one of :data:`FORMS`."""
    null, texts = form
    return [_as_form(turn, null=null, texts=texts) if "tool_calls" in turn else turn for turn in turns]


def _as_form(turn: dict[str, Any], *, null: bool, texts: bool) -> dict[str, Any]:
    turn = {**turn, "content": None} if null and not turn["content"] else turn
    return {**turn, "tool_calls": list(_with_texts(turn["tool_calls"]))} if texts else turn


def _with_texts(calls: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for call in calls:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        yield {**call, "function": {**call["function"], "arguments": arguments}}
