"""Lists and conversations stored as text, as CSV files and ``str(turns)`` write them."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from falign.choices import shown
from falign.errors import DataError

__all__ = ["is_blank", "parsed_conversation", "parsed_list"]

_TURN_KEYS = (("role", "content"), ("from", "value"))
_BLANK = frozenset({"", "[]", "{}", "null", "none", "nan"})


def is_blank(value: Any) -> bool:
    """Return whether a value is empty: null, NaN, an empty text or list, also one written as text.

    Example:
        >>> [is_blank(value) for value in ("[]", None, [], " ", 0, False, "x")]
        [True, True, True, True, False, False, False]
    """
    if isinstance(value, str):
        return value.strip().lower() in _BLANK
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, list | tuple | Mapping) and not value)


def parsed_list(value: Any) -> Any:
    """Return the list that a text represents in JSON or Python syntax; any other value unchanged.

    Example:
        >>> parsed_list("[1, 2]"), parsed_list("['a']"), parsed_list("a")
        ([1, 2], ['a'], 'a')
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        found = _parsed(value)
        return found if isinstance(found, list) else value
    return value


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
    found = _parsed(value)
    if found is None:
        raise DataError(
            f"{place}: {field!r} is a conversation written as text that is neither JSON nor a Python list "
            f"({shown(value)}); store the turns as a list, or as JSON."
        )
    turns = [found] if isinstance(found, Mapping) else found
    return turns if isinstance(turns, list) and turns and all(map(_is_turn, turns)) else value


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and any(all(key in value for key in keys) for keys in _TURN_KEYS)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # may be Python syntax
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unknown backslash escapes
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
