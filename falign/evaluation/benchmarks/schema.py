"""The published columns of each benchmark, and checked access to a row's fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from falign.choices import shown
from falign.data import BadRows, Row, Text, read_rows
from falign.data.conversations import read_text
from falign.errors import DataError
from falign.evaluation.benchmarks.base import BenchmarkItem

__all__ = ["COLUMNS", "PAIR_COLUMNS", "identifier", "items_of", "prompt_of", "read_published", "string", "texts"]

COLUMNS: dict[str, frozenset[str]] = {
    "rewardbench2": frozenset({"id", "prompt", "chosen", "rejected", "num_correct", "subset"}),
    "rm_bench": frozenset({"id", "prompt", "chosen", "rejected"}),
    "judgebench": frozenset({"pair_id", "source", "question", "response_A", "response_B", "label"}),
    "llmbar": frozenset({"input", "output_1", "output_2", "label"}),
    "rewardbench": frozenset({"prompt", "chosen", "rejected", "subset"}),
}
"""Columns that a row needs, by the name of the benchmark."""

PAIR_COLUMNS: frozenset[str] = frozenset({"prompt", "chosen", "rejected"})
"""Columns of RewardBench's prior sets; each set is a split of its own, and no column names it."""

_REMEDY = "fix the row or remove it"


def read_published(
    name: str, path: str, *, split: str, bad_rows: BadRows, columns: frozenset[str] | None = None
) -> Iterator[Row]:
    """Yield the rows of a benchmark's source; the first one must have the benchmark's schema.

    Args:
        name: A name of ``COLUMNS``.
        path: A file, a folder or a Hub dataset.
        split: Split of a folder or of the Hub's dataset.
        bad_rows: Collects lines that are not rows, and later rows that lack a column.
        columns: Required columns, if they are not ``COLUMNS[name]``.

    Raises:
        DataError: The source cannot be read, or it has another schema.
    """
    columns = columns or COLUMNS[name]
    first = True
    for row in read_rows(path, split=split, bad_rows=bad_rows):
        error = _wrong_schema(row, name, columns)
        if error is None:
            yield row
        elif first:  # all rows of another kind of source are bad, and skipping them would hide the reason
            raise error
        else:
            bad_rows.add(error)
        first = False


def items_of(
    rows: Iterable[Row], item: Callable[[Row], BenchmarkItem], *, source: str, bad_rows: BadRows
) -> Iterator[BenchmarkItem]:
    """Yield the items of rows.

    Args:
        rows: The rows of one source.
        item: Function from a row to its item.
        source: The source's name, for messages.
        bad_rows: Collects rows for which `item` raises DataError.

    Raises:
        DataError: No row gives an item.
    """
    empty, first = True, ""
    for row in rows:
        try:
            made = item(row)
        except DataError as error:
            bad_rows.add(error)
            first = first or f" The first bad row: {error}"
            continue
        empty = False
        yield made
    if empty:
        raise DataError(f"{source}: none of its rows is an item of the benchmark.{first}")


def _wrong_schema(row: Row, name: str, columns: frozenset[str]) -> DataError | None:
    missing = sorted(columns - row.fields.keys())
    found = _looks_like(row)
    # Columns alone do not identify a benchmark: RewardBench 2 has all those of RM-Bench, and a list of answers has the
    # column names of a single one.
    if not missing and (found == name or found not in COLUMNS):
        return None
    problem = f"{name} also needs the columns {missing}" if missing else f"this is not a row of {name}"
    message = f"{row.place}: {problem}; the row has {sorted(row.fields)}."
    if found is not None and found != name:
        return DataError(f"{message} It looks like {found}: name that benchmark, or give another file.")
    return DataError(f"{message} Check the file, or name the benchmark that it belongs to.")


def _looks_like(row: Row) -> str | None:
    chosen = row.fields.get("chosen")
    several = isinstance(chosen, list | tuple) and all(isinstance(text, str) for text in chosen)
    for name, columns in COLUMNS.items():
        if row.fields.keys() >= columns and several == (name in ("rewardbench2", "rm_bench")):
            return name
    pair = row.fields.keys() >= {"chosen", "rejected"} or row.fields.keys() >= {"prompt", "completions"}
    return "preferences" if pair else None


def identifier(row: Row, column: str) -> str:
    """Return a row's own id, or else its place within the source (``"12"`` for ``"pairs.jsonl:12"``)."""
    value = row.fields.get(column)
    return row.place.replace(":", " ").rsplit(" ", 1)[-1] if value is None else str(value)


def string(row: Row, column: str) -> str:
    """Return a column's text.

    Raises:
        DataError: It is not text, or it is empty.
    """
    return _text(row.fields[column], row.place, column)


def texts(row: Row, column: str) -> tuple[str, ...]:
    """Return a column's list of texts.

    Raises:
        DataError: It is not a list of texts, or one of them is empty.
    """
    value = row.fields[column]
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{row.place}: {column!r} is {shown(value)}; it must be a list of texts: {_REMEDY}.")
    return tuple(_text(text, row.place, f"{column}[{i}]") for i, text in enumerate(value))


def prompt_of(row: Row, column: str = "prompt") -> Text:
    """Return a prompt: plain text, or turns.

    Raises:
        DataError: It is neither, or it is empty.
    """
    value = row.fields[column]
    turns = read_text(value, place=row.place, field=column)
    if isinstance(turns, str):
        return string(row, column)
    for turn in turns:
        _require_unicode(turn["content"], row.place, column)
    if not turns or not turns[-1]["content"].strip():
        raise DataError(f"{row.place}: {column!r} is {shown(value)}; its last turn must contain text: {_REMEDY}.")
    return turns


def _text(value: Any, place: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {field!r} is {shown(value)}; it must be text: {_REMEDY}.")
    if not value.strip():
        raise DataError(f"{place}: {field!r} is empty ({shown(value)}); it must contain text: {_REMEDY}.")
    _require_unicode(value, place, field)
    return value


def _require_unicode(text: str, place: str, field: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{place}: {field!r} has half a surrogate pair ({shown(text)}); it must be Unicode: {_REMEDY}.")
