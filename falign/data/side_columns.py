"""Columns beside a row's texts: how much the row counts, and what its chat template reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from falign.choices import shown
from falign.data.chat_template import NO_INPUTS, RESERVED, TemplateInputs
from falign.data.files import Row
from falign.data.text_values import is_blank
from falign.errors import DataError

__all__ = ["OPTIONS", "SIDE_COLUMNS", "TOOLS", "WEIGHT", "row_weight", "template_inputs"]

WEIGHT = "weight"
"""Column with the weight of a row."""

TOOLS = "tools"
"""Column with the definitions of the functions that the assistant may call."""

OPTIONS = "chat_template_kwargs"
"""Column with further variables of the chat template."""

SIDE_COLUMNS = (WEIGHT, TOOLS, OPTIONS)
"""Columns that every layout may have."""


def row_weight(value: Any, place: str) -> float:
    """Return the weight of a row.

    Args:
        value: A number, or its text, as CSV stores it.
        place: The row, for messages.

    Raises:
        DataError: The weight is missing, or not a positive finite number.

    Example:
        >>> row_weight("0.5", "pairs.csv row 2")
        0.5
    """
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
        raise DataError(
            f"{place}: {WEIGHT!r} is {shown(value)}; it must be a positive, finite number: remove rows that should not "
            f"count, or set ignore=[{WEIGHT}] if the column means something else."
        )
    return float(number)


def template_inputs(row: Row) -> TemplateInputs:
    """Return what the chat template reads of a row besides its turns.

    Args:
        row: The row, with ``tools`` as a list of definitions, and ``chat_template_kwargs`` as an object; or with the
            JSON texts of these.

    Raises:
        DataError: A value is something else.

    Example:
        >>> row = Row("rows.jsonl:1", {"chat_template_kwargs": '{"enable_thinking": false}'})
        >>> template_inputs(row).options
        {'enable_thinking': False}
    """
    tools, options = (_parsed(row.fields.get(name), f"{row.place}: {name!r}") for name in (TOOLS, OPTIONS))
    if tools is None and options is None:
        return NO_INPUTS
    tools = [] if tools is None else [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) and tool for tool in tools):
        raise DataError(
            f"{row.place}: {TOOLS!r} is {shown(row.fields[TOOLS])}; it must be a list of definitions, as in "
            '[{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}].'
        )
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise DataError(f"{row.place}: {OPTIONS!r} is {shown(row.fields[OPTIONS])}; it must be an object of options.")
    if reserved := sorted(RESERVED & options.keys()):
        raise DataError(f"{row.place}: {OPTIONS!r} has {reserved[0]!r}, which falign itself sets; remove it.")
    # Tables give every row the keys of all rows, with nulls where a row has none.
    return TemplateInputs(tuple(tools), {name: value for name, value in options.items() if value is not None})


def _parsed(value: Any, place: str) -> Any:
    if is_blank(value):
        return None
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is text that is not JSON ({error}): {shown(value)}.") from error
