"""Columns under other names, and columns inside columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from falign.choices import shown
from falign.data.column_names import as_list, as_mapping
from falign.data.files import Row
from falign.data.serialized import is_blank
from falign.errors import DataError

__all__ = ["renamed", "without_turn_keys"]


def renamed(row: Row, columns: Mapping[str, str], *, ignore: Collection[str] = ()) -> Row:
    """Return a row with other column names.

    Args:
        row: As it stands in the source.
        columns: New name to the row's; ``outer.inner`` is the entry ``inner`` of the column ``outer``.
        ignore: Columns that are left out, and keys that turns lose.

    Raises:
        DataError: The row lacks the column, or already has a column with the new name.
    """
    taken = {name: _found(row, name, column) for name, column in columns.items()}
    left_out = {*columns.values(), *ignore}
    for name, value in taken.items():
        lost = row.fields.get(name)
        if name not in left_out and not is_blank(lost) and lost != value:
            raise DataError(
                f"{row.place}: columns={as_mapping({name: columns[name]})} would replace the column {name!r} "
                f"({shown(lost)}), which the row has, too; name that in ignore ({as_list([name])}) to leave it out, or "
                "in columns under another name."
            )
    kept = {name: value for name, value in row.fields.items() if name not in left_out}
    fields = kept | taken
    return Row(
        row.place, {name: without_turn_keys(value, ignore) for name, value in fields.items()} if ignore else fields
    )


def without_turn_keys(value: Any, ignore: Collection[str]) -> Any:
    """Return a conversation without some keys of its turns; any other value unchanged."""
    if isinstance(value, Mapping):
        return {name: inner for name, inner in value.items() if name not in ignore}
    if isinstance(value, list):
        return [without_turn_keys(inner, ignore) if isinstance(inner, Mapping | list) else inner for inner in value]
    return value


def _found(row: Row, name: str, column: str) -> Any:
    if column in row.fields:
        return row.fields[column]
    value: Any = row.fields
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise DataError(
                f"{row.place}: columns={as_mapping({name: column})} names a column that is missing; "
                f"the row has {sorted(row.fields)}."
            )
        value = value[part]
    return value
