"""Rows in memory: a ``datasets.Dataset``, a pandas ``DataFrame``, or a list of mappings."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from falign.choices import shown
from falign.data.files import Row
from falign.data.reports import BadRows
from falign.errors import DataError

__all__ = ["PYTHON", "InMemory"]

PYTHON = "python:"
"""Prefix of the path that records use for a source in memory."""


class InMemory:
    """Rows in memory, as a source of data.

    Args:
        values: A ``Dataset``, a ``DataFrame``, or a sequence of mappings from column to value.

    Raises:
        DataError: ``values`` is another object; the message says how to make rows of it.

    Example:
        >>> list(InMemory([{"prompt": "2 + 2 ="}]).read())
        [Row(place='python:list row 1', fields={'prompt': '2 + 2 ='})]
    """

    def __init__(self, values: Any) -> None:
        self.path = f"{PYTHON}{type(values).__name__}"
        """Stands for the rows in place of a file's path."""
        self._values = _table(values, self.path)

    def read(self, *, bad_rows: BadRows | None = None) -> Iterator[Row]:
        """Yield the rows; ``bad_rows`` receives those that are not mappings, and raises by default."""
        bad_rows = bad_rows or BadRows()
        for number, fields in enumerate(self._values, start=1):
            place = f"{self.path} row {number}"
            if isinstance(fields, Mapping):
                yield Row(place, dict(fields))
            else:
                bad_rows.add(DataError(f"{place}: the row is {shown(fields)}; a row must map column names to values."))


def _table(values: Any, name: str) -> Any:
    """Return rows that can be read repeatedly, each a mapping."""
    # An object of these libraries exists only if they are loaded, so they need not be imported here.
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")
    if pandas is not None and isinstance(values, pandas.DataFrame):
        return _of_frame(values, name)
    if datasets is not None and isinstance(values, datasets.Dataset):
        return values.with_format(None)
    if isinstance(values, Mapping):
        splits = f"; its keys are {shown(list(values))}: give one of them" if values else ""
        raise DataError(f"{name}: rows are a Dataset, a DataFrame or a list of mappings, not a mapping{splits}.")
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise DataError(
            f"{name}: rows are a Dataset, a DataFrame or a list of mappings, which can be read more than once; "
            "make a list of it."
        )
    return values


def _of_frame(frame: Any, name: str) -> Any:
    import datasets
    import pyarrow

    try:
        # Missing values become None, and arrays lists.
        return datasets.Dataset.from_pandas(frame, preserve_index=False)
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{name}: a column has values of several types ({error}); make them one type.") from error
