"""A file of rows that appears only when it is complete; a stopped call can be continued.

Rows are written to ``.NAME.partial.jsonl`` beside the output, their checksums to ``.NAME.partial.sha256``, and a record
of the inputs that they depend on to ``.NAME.partial.json``. All three are removed when the output is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from falign.durable import checksum, lock, refuse_link, sync_folder, write_whole, writing
from falign.errors import ConfigError, without_passwords
from falign.evaluation.completion_scorer import ScoreRow
from falign.scoring import PromptTree

__all__ = ["ScoreOutput", "check_output", "reopen"]

SUFFIXES = (".jsonl", ".parquet")
_ROWS_PER_GROUP = 1024
_SUM_LENGTH = 64


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Refuse an output that cannot be written, before anything is computed.

    Args:
        path: The output.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ConfigError: Its suffix is unknown, it exists, or its folder is missing.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: the suffix {path.suffix!r} is unknown; name it .jsonl or .parquet.")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file.")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists: name another file, or give overwrite=True to score again.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: the folder {path.parent} does not exist; create it.")


class ScoreOutput:
    """Writes rows in the order of the source, after returning those that a stopped call has written.

    Use it in a ``with`` block: call :meth:`take` for each tree until it returns None, then :meth:`append`, and finally
    :meth:`finish`. If the block ends without :meth:`finish`, the rows are kept for the next call.

    Args:
        path: ``.jsonl`` or ``.parquet``.
        record: The inputs that the rows depend on, by name, as plain values.
        overwrite: Replace an existing output when the new one is complete. Rows of a stopped call are used if they have
            the same record, and dropped otherwise.

    Raises:
        ConfigError: The output cannot be written, another process is writing it, or a stopped call has left rows with
            another record.
    """

    def __init__(self, path: Path, *, record: Mapping[str, Any], overwrite: bool = False) -> None:
        check_output(path, overwrite=overwrite)
        self.path = path
        self.rows_file, self.record_file, self._sums_file = _rows_file(path), _record_file(path), _sums_file(path)
        for file in (path, self.rows_file, self.record_file, self._sums_file):
            refuse_link(file)
        begun = self.rows_file.exists()
        try:
            self._file = _opened(self.rows_file)
            self._sums = _opened(self._sums_file)
        except OSError as error:
            raise ConfigError(
                f"{self.rows_file} cannot be opened ({error}): remove it, or rename the output."
            ) from error
        try:
            lock(self._file.fileno(), self.rows_file)
            self._claim(json.loads(json.dumps(record)), begun=begun, overwrite=overwrite)
        except BaseException:
            self._file.close()
            self._sums.close()
            raise
        self._expected = [line.rstrip(b"\n") for line in self._sums]
        self._num_rows = 0
        self._reading = True

    def __enter__(self) -> ScoreOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sums.close()
        if self.rows_file.exists() and not self.rows_file.stat().st_size:
            self._remove_partial()
        self._file.close()

    def take(self, tree: PromptTree) -> list[ScoreRow] | None:
        """Return the rows of the next tree if a stopped call has written them.

        Args:
            tree: The next tree of the source.

        Raises:
            ConfigError: The rows belong to another tree, so the source has changed.
        """
        hashes = [{"text_sha256": each} for each in tree.text_sha256] or [{} for _ in tree.completion_ids]
        expected = [
            {"place": tree.place, "completion": i, "token_ids": list(ids), **text}
            for i, (ids, text) in enumerate(zip(tree.counted_ids, hashes, strict=True))
        ]
        return self.take_rows(expected, form=ScoreRow)  # pyright: ignore[reportReturnType]

    def take_rows(self, expected: Sequence[Mapping[str, Any]], *, form: Any) -> list[dict[str, Any]] | None:
        """Return the next rows if a stopped call has written all of them.

        If some are missing, the others are removed, and this and all later calls return None.

        Args:
            expected: Fields that each row must have, with their values; ``place`` is one of them.
            form: The ``TypedDict`` of a row.

        Raises:
            ConfigError: A row has another value, so the source has changed, or a row is damaged.
        """
        if not self._reading:
            return None
        start = self._file.tell()
        rows: list[dict[str, Any]] = []
        for wanted in expected:
            row = self._next_row()
            if row is None:
                self._cut(start, self._num_rows - len(rows))
                return None
            try:
                TypeAdapter(form).validate_python(row)
            except ValidationError as error:
                raise ConfigError(
                    f"{self.rows_file}: the row of {wanted['place']} is damaged ({error.errors()[0]['msg']}): give "
                    "overwrite=True to start again."
                ) from error
            if any(row.get(name) != value for name, value in wanted.items()):
                raise self._changed(f"its next row is {row.get('place')}, and the source has {wanted['place']} there")
            rows.append(row)
        return rows

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to the file; from here on they survive the end of the process."""
        assert not self._reading
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass") for row in rows]
        self._file.write(b"".join(line + b"\n" for line in lines))
        self._file.flush()
        # After the rows: a row whose checksum is missing is not used.
        self._sums.write(b"".join(_sum(line) + b"\n" for line in lines))
        self._sums.flush()

    def checksum(self) -> str:
        """Return the SHA-256 of all rows so far; after the last row, it is that of the JSONL output."""
        return checksum(self.rows_file)

    def finish(self) -> None:
        """Give the complete output its name, and remove the partial files.

        Raises:
            ConfigError: A stopped call has left rows after the last one of the source.
        """
        if self._reading and self._file.readline():
            raise self._changed("it has rows after the last one of the source")
        os.fsync(self._file.fileno())
        if self.path.suffix == ".parquet":
            with writing(self.path) as temporary:
                _write_parquet(self.rows_file, temporary)
        else:
            self.rows_file.replace(self.path)
            sync_folder(self.path.parent)
        self._remove_partial()

    def _remove_partial(self) -> None:
        for file in (self.rows_file, self._sums_file, self.record_file):
            file.unlink(missing_ok=True)

    def _next_row(self) -> dict[str, Any] | None:
        """Return the next row; None at the end, or if the row is incomplete or damaged."""
        line = self._file.readline()
        if not line.endswith(b"\n") or self._num_rows == len(self._expected):
            return None
        if _sum(line.rstrip(b"\n")) != self._expected[self._num_rows]:
            return None
        self._num_rows += 1
        return json.loads(line.decode("utf-8", "surrogatepass"))

    def _cut(self, start: int, num_rows: int) -> None:
        """Remove all rows from an offset of the file on, and stop returning rows."""
        self._file.seek(start)
        self._file.truncate()
        self._sums.seek(num_rows * (_SUM_LENGTH + 1))
        self._sums.truncate()
        self._reading = False

    def _claim(self, record: dict[str, Any], *, begun: bool, overwrite: bool) -> None:
        """Continue with the rows of a stopped call if they have the same record, or start an empty file."""
        if begun and self._file.seek(0, os.SEEK_END) > 0:
            found = None
            try:
                found = self._read_record()
            except ConfigError:
                if not overwrite:
                    raise
            names = [] if found is None else [k for k in {**found, **record} if found.get(k) != record.get(k)]
            if found is not None and names and not overwrite:
                shown = ", ".join(f"{name} ({found.get(name)!r} there, {record.get(name)!r} now)" for name in names)
                raise ConfigError(
                    f"{self.rows_file} belongs to a stopped call with other settings: {shown}. Continue with the same "
                    "settings, name another file, or give overwrite=True to start again."
                )
            if found is not None and not names:
                self._file.seek(0)
                return
        self._file.truncate(0)
        self._sums.truncate(0)
        self._file.seek(0)
        write_whole(self.record_file, without_passwords(json.dumps(record, indent=1)))

    def _read_record(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.record_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{self.record_file}, the record of {self.rows_file}, cannot be read ({error}): give overwrite=True to "
                "start again."
            ) from error

    def _changed(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self.rows_file} belongs to a source that has changed: {what}. Restore the source, or give "
            "overwrite=True to start again."
        )


def reopen(path: Path, *, sibling: Path) -> None:
    """Turn a finished ``.jsonl`` back into a partial file if the call stopped before its sibling was finished.

    Both outputs of a call have the same record, so that the next call can continue with both.

    Args:
        path: The output that is finished first.
        sibling: The output that is finished after it.
    """
    if path.exists() and not sibling.exists() and _record_file(sibling).exists():
        write_whole(_record_file(path), _record_file(sibling).read_text(encoding="utf-8"))
        with path.open("rb") as lines:
            write_whole(_sums_file(path), b"".join(_sum(line.rstrip(b"\n")) + b"\n" for line in lines))
        path.replace(_rows_file(path))


def _rows_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial.jsonl")


def _record_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial.json")


def _sums_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial.sha256")


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")


def _sum(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest().encode()


def _write_parquet(rows_file: Path, path: Path) -> None:
    """Convert a file of rows to Parquet in groups of rows; numbers are 32-bit, as computed, except preferences."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    floats = pa.list_(pa.float32())
    types: dict[str, Any] = {
        "place": pa.string(),
        "completion": pa.int32(),
        "preference": pa.float64(),
        "num_tokens": pa.int32(),
        "token_ids": pa.list_(pa.int32()),
        "text_sha256": pa.string(),
        **dict.fromkeys(("logprobs", "reference_logprobs", "log_ratios"), floats),
        **dict.fromkeys(("log_ratio", "implicit_reward"), pa.float32()),
        **dict.fromkeys(("entropy", "token_divergence"), floats),
    }
    with rows_file.open("rb") as file:
        columns = json.loads(file.readline())
        file.seek(0)
        schema = pa.schema([(name, types[name]) for name in columns])
        with pq.ParquetWriter(path, schema) as writer:
            while lines := list(islice(file, _ROWS_PER_GROUP)):
                writer.write_batch(pa.RecordBatch.from_pylist(list(map(json.loads, lines)), schema=schema))
