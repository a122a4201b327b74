"""Conversations: lists of turns in the layouts in use, also if a file holds them as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from falign.choices import shown
from falign.data.text_values import is_blank, parsed, parsed_list
from falign.data.tool_calls import read_tool_calls
from falign.errors import DataError

__all__ = [
    "ROLES",
    "TOOL_CALLS",
    "Message",
    "Text",
    "common_turns",
    "looks_like_hh",
    "parsed_conversation",
    "read_dialogue",
    "read_messages",
    "read_text",
]


Message = dict[str, Any]
"""One turn: ``{"role": ..., "content": ...}``, both text, and any other keys for the chat template."""

Text = str | list[Message]
"""A plain string, or a conversation."""

ROLES: Mapping[str, str] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
}
"""Accepted roles, and falign's name for each; the last two are sharegpt's."""

TOOL_CALLS = "tool_calls"

_HH_TURN = re.compile(r"\r?\n\r?\n(Human|Assistant):")


def read_text(value: Any, *, place: str, field: str) -> Text:
    """Return a column's text or conversation; a conversation that is written as text is parsed.

    Args:
        value: Text, a list of turns, or one turn.
        place: The row, for messages.
        field: The column, for messages.

    Raises:
        DataError: The value is neither text nor a conversation.
    """
    value = parsed_conversation(value, place=place, field=field)
    return value if isinstance(value, str) else read_messages(value, place=place, field=field)


def read_messages(value: Any, *, place: str, field: str) -> list[Message]:
    """Return the turns of a conversation written as ``role``/``content`` or ``from``/``value``.

    Args:
        value: A list of turns, or one turn.
        place: The row, for messages.
        field: The column, for messages.

    Raises:
        DataError: The value is not a conversation of text turns with known roles.
    """
    value = parsed_list(parsed_conversation(value, place=place, field=field))
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list):
        raise DataError(
            f"{place}: {field!r} is {shown(value)}; it must be text or a list of turns with role and content."
        )
    return [_read_turn(turn, place, f"{field}[{i}]") for i, turn in enumerate(turns)]


def _read_turn(turn: Any, place: str, field: str) -> Message:
    names = ("from", "value") if isinstance(turn, Mapping) and "role" not in turn else ("role", "content")
    calls = isinstance(turn, Mapping) and not is_blank(turn.get(TOOL_CALLS))
    if not isinstance(turn, Mapping) or not all(name in turn for name in names[: 1 if calls else 2]):
        raise DataError(f"{place}: {field!r} is {shown(turn)}; a turn must have role and content (or from and value).")
    role, content = turn[names[0]], turn.get(names[1])
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{place}: {field!r} has the unknown role {shown(role)}; use one of {sorted(ROLES)}.")
    content = _joined_parts(content)
    if calls and ROLES[role] != "assistant":
        raise DataError(f"{place}: {field!r} has tool calls in a turn by {role!r}; only the assistant calls tools.")
    if calls and is_blank(content):
        content = ""
    if not isinstance(content, str):
        raise DataError(
            f"{place}: the content of {field!r} is {shown(content)}; it must be text (images are not supported)."
        )
    # The chat template may read other keys; rendering checks that it does.
    others = {key: inner for key, inner in turn.items() if key not in {*names, TOOL_CALLS} and not is_blank(inner)}
    if calls:
        others[TOOL_CALLS] = read_tool_calls(turn[TOOL_CALLS], place=place, field=field)
    return {"role": ROLES[role], "content": content, **others}


def _joined_parts(content: Any) -> Any:
    """Return the text of ``[{"type": "text", "text": ...}]``; content with other parts unchanged."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part for part in content]
    joined = [text for text in texts if isinstance(text, str)]
    return "".join(joined) if len(joined) == len(texts) else content


def looks_like_hh(text: str) -> bool:
    """Return whether a string is a whole dialogue as HH-RLHF writes it."""
    return text.lstrip().startswith("Human:") and any(role == "Assistant" for role in _HH_TURN.findall(text))


def read_dialogue(value: Any, *, place: str, field: str) -> list[Message]:
    r"""Return the turns of ``"\n\nHuman: ... \n\nAssistant: ..."``.

    Raises:
        DataError: The value is not such a string.

    Example:
        >>> read_dialogue("\n\nHuman: Hi\n\nAssistant: Hello", place="x:1", field="chosen")
        [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    parts = _HH_TURN.split("\n\n" + value.lstrip()) if isinstance(value, str) else [""]
    if parts[0].strip() or len(parts) == 1:
        raise DataError(f"{place}: {field!r} is {shown(value)}; format hh needs text that starts with '\\n\\nHuman:'.")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def common_turns(*conversations: list[Message]) -> list[Message]:
    """Return the turns that all conversations begin with, without the last turn of any.

    Example:
        >>> hi, a, b = ({"role": "user", "content": text} for text in "xab")
        >>> common_turns([hi, a], [hi, b]) == [hi]
        True
    """
    count, most = 0, min((len(turns) - 1 for turns in conversations), default=0)
    while count < most and all(turns[count] == conversations[0][count] for turns in conversations):
        count += 1
    return conversations[0][:count] if conversations else []


_TURN_KEYS = (("role", "content"), ("from", "value"))


def parsed_conversation(value: Any, *, place: str, field: str) -> Any:
    """Return the turns that a text represents in JSON or Python syntax; any other value unchanged.

    Args:
        value: The value of a column that holds text or a conversation.
        place: The row, for messages.
        field: The column, for messages.

    Raises:
        DataError: The text has the keys of turns, but cannot be parsed.

    Example:
        >>> parsed_conversation("[{'role': 'user', 'content': 'Hi'}]", place="x:1", field="prompt")
        [{'role': 'user', 'content': 'Hi'}]
    """
    if not isinstance(value, str) or not re.match(r"\s*(array\()?\s*(\[\s*)?\{", value):
        return value
    if not any(all(re.search(rf"(['\"]){key}\1\s*:", value) for key in keys) for keys in _TURN_KEYS):
        return value
    found = parsed(value)
    if found is None:
        raise DataError(
            f"{place}: {field!r} is a conversation written as text that is neither JSON nor a Python list "
            f"({shown(value)}); store the turns as a list, or as JSON."
        )
    turns = [found] if isinstance(found, Mapping) else found
    return turns if isinstance(turns, list) and turns and all(map(_is_turn, turns)) else value


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and any(all(key in value for key in keys) for keys in _TURN_KEYS)
