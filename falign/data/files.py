"""Rows from one data file: JSON, JSON lines (both also gzipped), CSV and Parquet."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from falign.choices import shown
from falign.data.reports import BadRows
from falign.errors import DataError

__all__ = ["FILE_SUFFIXES", "Row", "data_suffix", "read_file"]

_NOT_AN_OBJECT = "a row must be a JSON object with named columns"


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        place: Its location, for messages: ``"pairs.jsonl:12"`` or ``"pairs.parquet row 12"``, counted from 1.
        fields: Column name to value.
    """

    place: str
    fields: dict[str, Any]


def data_suffix(path: Path) -> str:
    """Return the file type by name, without ``.gz``: ``".jsonl"`` for ``pairs.jsonl.gz``."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def read_file(path: Path, *, bad_rows: BadRows, name: str | None = None) -> Iterator[Row]:
    """Yield the rows of one file; its suffix gives the type.

    Args:
        path: An existing file.
        bad_rows: Receives lines that are not rows.
        name: The name of the file in messages; default: the path.

    Raises:
        DataError: The type is unknown, or the file cannot be read.
    """
    name = name or str(path)
    suffix = data_suffix(path)
    if suffix not in _READERS or (path.suffix.lower() == ".gz" and suffix not in {".json", ".jsonl"}):
        raise DataError(f"{name}: the file type {path.suffix!r} is not supported; use one of {FILE_SUFFIXES}.")
    try:
        yield from _READERS[suffix](path, name, bad_rows)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text ({error}); save the file as UTF-8.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}: damaged gzip file ({error}); fetch or compress it again.") from error


def _open(path: Path, newline: str | None = None) -> TextIOWrapper:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


class _RepeatedKeyError(ValueError):
    """A duplicate key in a JSON object, of which Python would keep the last value."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKeyError(f"the key {_repeated(name for name, _ in pairs)!r} comes twice in an object; keep one")
    return found


def _repeated(names: Iterable[str]) -> str | None:
    """Return the first duplicate name; columns without a name do not count."""
    return next((name for name, count in Counter(names).items() if count > 1 and name), None)


def _check_columns(names: Sequence[str], place: str) -> None:
    if (name := _repeated(names)) is not None:
        raise DataError(f"{place}: the column {name!r} comes twice, and a row has one value for it; keep one.")


def _read_lines(lines: TextIOWrapper, name: str, bad_rows: BadRows) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except (RecursionError, ValueError) as error:
            if not isinstance(error, json.JSONDecodeError):  # nested too deeply, too many digits, a repeated key
                bad_rows.add(DataError(f"{place}: {error}; correct the line."))
                continue
            problem = f"{place}: this line is not JSON ({error.msg} at character {error.pos + 1})"
            bad_rows.add(DataError(f"{problem}: {shown(line.strip())}; put one complete JSON object on each line."))
            continue
        if isinstance(value, dict):
            yield Row(place, value)
        else:
            bad_rows.add(DataError(f"{place}: the line holds {shown(value)}; {_NOT_AN_OBJECT}."))


def _read_jsonl(path: Path, name: str, bad_rows: BadRows) -> Iterator[Row]:
    with _open(path, newline="\n") as lines:
        yield from _read_lines(lines, name, bad_rows)


def _read_json(path: Path, name: str, bad_rows: BadRows) -> Iterator[Row]:
    with _open(path, newline="\n") as file:
        try:
            value = json.load(file, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            # "Extra data" after a first complete object: JSON lines named .json, which is common.
            if error.msg == "Extra data":
                file.seek(0)
                yield from _read_lines(file, name, bad_rows)
                return
            raise DataError(f"{name}:{error.lineno}: not JSON ({error.msg}, column {error.colno}); fix it.") from error
        except UnicodeDecodeError:
            raise
        except _RepeatedKeyError as error:
            raise DataError(f"{name}: {error}.") from error
        except (RecursionError, ValueError) as error:  # nested too deeply, or a number with too many digits
            raise DataError(f"{name}: not readable JSON ({error}); correct it.") from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(
            f'{name}: the top level must be a list of rows or {{"data": [rows]}}, not {shown(value)}; '
            "wrap the rows in a list, or name a file of JSON lines .jsonl."
        )
    for number, fields in enumerate(rows, start=1):
        place = f"{name} row {number}"
        if isinstance(fields, dict):
            yield Row(place, fields)
        else:
            bad_rows.add(DataError(f"{place}: the row is {shown(fields)}; {_NOT_AN_OBJECT}."))


def _read_csv(path: Path, name: str, bad_rows: BadRows) -> Iterator[Row]:
    with _open(path, newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            _check_separator(header, name)
            _check_columns(header, f"{name}:1")
            start = reader.line_num + 1
            for cells in reader:
                place, start = f"{name}:{start}", reader.line_num + 1
                if len(cells) == len(header):
                    yield Row(place, dict(zip(header, cells, strict=True)))
                elif cells:
                    problem = f"{place}: {len(cells)} cells under {len(header)} column names {shown(header)}"
                    bad_rows.add(DataError(f"{problem}; quote cells that contain commas or line ends."))
        except csv.Error as error:
            problem = f"{name}:{reader.line_num}: not CSV ({error})"
            raise DataError(f"{problem}; save long or multi-line text as .jsonl instead.") from error


def _check_separator(header: list[str], name: str) -> None:
    for separator, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")):
        if len(header) == 1 and separator in header[0]:
            raise DataError(
                f"{name}:1: the columns are separated by {called}, {shown(header[0])}; save the file with commas, or "
                "as .jsonl."
            )


def _read_parquet(path: Path, name: str, bad_rows: BadRows) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, name)
            for batch in file.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{name} row {number}", fields)
    except (pyarrow.ArrowException, OSError) as error:  # thrift errors arrive as OSError
        raise DataError(f"{name}: not a readable Parquet file ({error}); write it again.") from error


_READERS: dict[str, Callable[[Path, str, BadRows], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
FILE_SUFFIXES: tuple[str, ...] = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".csv", ".parquet")
