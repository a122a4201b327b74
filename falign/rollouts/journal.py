"""A journal of results on disk, from which an interrupted call resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from falign.durable import append, refuse_link
from falign.errors import ConfigError, one_line
from falign.json_lines import sealed, unsealed

__all__ = ["Journal"]

T = TypeVar("T")

_OBJECT = TypeAdapter(dict[str, Any])


class Journal(Generic[T]):
    """A file of entries in their order, each line with its checksum; the first line records their inputs.

    Args:
        path: The file; created with the first entry.
        read: From plain values to an entry; a ``ValueError`` says that they are damaged.
        record: Inputs of the entries, by name; plain values.
        chunk_size: Number of entries per chunk; incomplete chunks are ignored.
        total: Total number of entries; the last chunk may be smaller if it reaches this number.
        work: The work that it belongs to, for messages.
        overwrite: Start again if the file is damaged or has other inputs.
        plain: From an entry to plain values.

    Attributes:
        entries: The entries so far.

    Raises:
        ConfigError: The file is damaged, has other inputs, or is a link.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[Any], T],
        *,
        record: Mapping[str, Any],
        chunk_size: int,
        total: int,
        work: str,
        overwrite: bool = False,
        plain: Callable[[T], Any] = lambda entry: entry,
    ) -> None:
        refuse_link(path)
        self.path, self._record = path, json.loads(json.dumps(record))
        self._of_plain, self._plain, self._work = read, plain, work
        self._chunk_size, self._total = chunk_size, total
        self.entries: list[T] = []
        self._size = 0  # bytes of the entries that are kept
        try:
            self._take_up()
        except ConfigError:
            if not overwrite:
                raise
            self.entries, self._size = [], 0

    def extend(self, entries: Sequence[T]) -> None:
        """Write the entries of a chunk to the disk, where they survive a kill of the process."""
        head = [] if self._size else [self._record]
        lines = "".join(map(sealed, [*head, *map(self._plain, entries)]))
        append(self.path, lines, after=self._size)
        self._size += len(lines.encode())
        self.entries += entries

    def _take_up(self) -> None:
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read ({error}): remove it, or choose another folder.") from error
        if not lines:
            return
        self._claim(self._read(_OBJECT.validate_python, lines[0], 1))
        rows = lines[1:]
        if len(rows) != self._total:
            rows = rows[: len(rows) // self._chunk_size * self._chunk_size]
        self.entries = [self._read(self._of_plain, row, number) for number, row in enumerate(rows, start=2)]
        self._size = sum(len(line) + 1 for line in [lines[0], *rows])

    def _read(self, read: Callable[[Any], Any], line: bytes, number: int) -> Any:
        try:
            return read(unsealed(line))
        except (ValueError, RecursionError) as error:  # pydantic's errors are ValueErrors
            reason = one_line(error)
            raise ConfigError(
                f"{self.path}:{number} is damaged ({reason}): remove the file, or give overwrite=True, and "
                f"{self._work} starts again."
            ) from error

    def _claim(self, found: Mapping[str, Any]) -> None:
        names = [name for name in {**found, **self._record} if found.get(name) != self._record.get(name)]
        if names:
            shown = ", ".join(f"{name} ({found.get(name)!r} there, {self._record.get(name)!r} now)" for name in names)
            raise ConfigError(
                f"{self.path} holds the beginning of another {self._work}: {shown}. Use the same settings, name "
                "another output, or start again with overwrite=True."
            )
