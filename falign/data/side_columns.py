"""Columns beside a row's texts: how much the row counts, and what its chat template reads."""

from __future__ import annotations

import math
from typing import Any

from falign.choices import shown
from falign.errors import DataError

__all__ = ["SIDE_COLUMNS", "WEIGHT", "row_weight"]

WEIGHT = "weight"
"""Column with the weight of a row."""

SIDE_COLUMNS = (WEIGHT,)
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
