"""Templates of text with columns in braces, such as ``"Question: {question}"``."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

__all__ = ["Template", "columns_of"]


class Template(string.Formatter):
    """Fill templates with columns, each by its whole name.

    ``str.format`` would also read attributes and items of a value: ``{prompt.__class__}``, ``{prompt[0]}``. Here these
    are names of columns, which may have a dot or a bracket, and do not exist otherwise.

    Example:
        >>> Template().fill("{a.b} + {n:.1f}", {"a.b": "x", "n": 2})
        'x + 2.0'
    """

    @override
    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[field_name], field_name

    def fill(self, template: str, columns: Mapping[str, Any]) -> str:
        """Return the text.

        Args:
            template: Text with columns in braces, which may have a format: ``{price:.2f}``.
            columns: Values by name.

        Raises:
            KeyError: A column is missing.
            ValueError: The template cannot be read, or a format does not fit the value.
            TypeError: A format does not fit the type of the value.
        """
        return self.vformat(template, (), columns)


def columns_of(template: str) -> list[str]:
    """Return the columns that a template names, in order, those within formats too.

    Args:
        template: Text with columns in braces.

    Raises:
        ValueError: A brace is not closed, or has no name in it.

    Example:
        >>> columns_of("{question} {price:{width}}"), columns_of("{{plain}}")
        (['question', 'price', 'width'], [])
    """
    names: list[str] = []
    for _, name, inner, _ in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or name[0].isdigit():
            raise ValueError("it has braces without the name of a column")
        names += [name, *columns_of(inner or "")]
    return names
