"""Values of columns that files without types, such as CSV, hold as text."""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

__all__ = ["is_blank", "parsed", "parsed_list"]

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
        found = parsed(value)
        return found if isinstance(found, list) else value
    return value


def parsed(text: str) -> Any:
    """Return the value that a text represents in JSON or Python syntax; None if it is in neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # may be Python syntax
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown backslash escapes
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
