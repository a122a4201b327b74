"""Rows of the tables of other libraries' settings: the run file's field of each, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Row", "Use", "Value", "copied", "each", "read", "refused", "unused"]

Value = Any
"""A value of YAML, JSON or a command line."""

Use = Literal["copied", "read", "unused", "refused"]
"""The treatment of a setting by an import: its value is copied to the field, translated together with others, left out
because it changes no result, or refused."""


@dataclass(frozen=True)
class Row:
    """The counterpart of another library's setting.

    Attributes:
        use: What an import does with the setting.
        fields: Paths of the run file; empty if falign has no such setting.
        note: A remark on the paths; without paths, the reason.
        harmless: Values that are not refused, because falign does the same without the setting.
        convert: For a copied value: its translation.
    """

    use: Use
    fields: tuple[str, ...] = ()
    note: str = ""
    harmless: tuple[Value, ...] = ()
    convert: Callable[[Value], Value] | None = None

    def message(self) -> str:
        """Return the last part of a message about the name."""
        if not self.fields:
            return f"falign has no such setting, because {self.note}."
        return f"here it is {' or '.join(self.fields)}{f' ({self.note})' if self.note else ''}."


def copied(field: str, note: str = "", convert: Callable[[Value], Value] | None = None) -> Row:
    """Return the row of a setting whose value goes to one field.

    Args:
        field: The field.
        note: A remark on it.
        convert: The translation of the value, if it has another form here.
    """
    return Row("copied", (field,), note, convert=convert)


def read(*fields: str, note: str = "") -> Row:
    """Return the row of a setting that is translated together with others.

    Args:
        fields: The fields that it decides; none if it is refused, with the reason as the note, unless it has the value
            that falign always has.
        note: A remark on the fields, or the reason.
    """
    return Row("read", fields, note)


def unused(reason: str, *fields: str) -> Row:
    """Return the row of a setting that changes no result, and has no counterpart or needs none.

    Args:
        reason: The reason, or a remark on the fields.
        fields: Fields that do something similar.
    """
    return Row("unused", fields, reason)


def refused(reason: str, *harmless: Value) -> Row:
    """Return the row of a setting that falign does not have.

    Args:
        reason: The reason.
        harmless: Values that falign has without the setting; a null is one of them.
    """
    return Row("refused", (), reason, (None, *harmless))


def each(names: str, row: Row) -> Mapping[str, Row]:
    """Return the same row for several names, separated by spaces."""
    return dict.fromkeys(names.split(), row)
