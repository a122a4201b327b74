"""A journal of pre-sampling on disk, from which an interrupted call resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from falign.durable import append, refuse_link
from falign.errors import ConfigError, one_line
from falign.json_lines import sealed, unsealed
from falign.rollouts.presampling import Presampled

__all__ = ["Finding", "PresamplingJournal"]


class _Stored(TypedDict):
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]


class Finding(NamedTuple):
    """The journal's entry for one prompt.

    Attributes:
        num_correct: How many of its completions are correct.
        rehearsal: ``prompt_ids``, ``completion_ids`` and ``logprobs`` of the completion to rehearse; None to explore.
    """

    num_correct: int
    rehearsal: _Stored | None


_OBJECT, _FINDING = TypeAdapter(dict[str, Any]), TypeAdapter(Finding)


class PresamplingJournal:
    """A file of results in the order of the prompts, each line with its checksum; the first line records their inputs.

    Args:
        path: The file; created with the first finding.
        record: Inputs of the findings, by name; plain values.
        chunk_size: Number of findings per chunk; incomplete chunks are ignored.
        num_prompts: Total number of findings; the last chunk may be smaller if it reaches this number.
        overwrite: Start again if the file is damaged or has other inputs.

    Raises:
        ConfigError: The file is damaged, has other inputs, or is a link.
    """

    def __init__(
        self, path: Path, *, record: Mapping[str, Any], chunk_size: int, num_prompts: int, overwrite: bool = False
    ) -> None:
        refuse_link(path)
        self.path, self._record = path, json.loads(json.dumps(record))
        self._chunk_size, self._num_prompts = chunk_size, num_prompts
        self.findings: list[Finding] = []
        self._size = 0  # bytes of the findings that are kept
        try:
            self._take_up()
        except ConfigError:
            if not overwrite:
                raise
            self.findings, self._size = [], 0

    def append(self, results: Sequence[Presampled]) -> None:
        """Write the findings of a chunk to the disk, where they survive a kill of the process."""
        found = [Finding(result.num_correct, _stored(result)) for result in results]
        head = [] if self._size else [self._record]
        lines = "".join(map(sealed, [*head, *(each._asdict() for each in found)]))
        append(self.path, lines, after=self._size)
        self._size += len(lines.encode())
        self.findings += found

    def _take_up(self) -> None:
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read ({error}): remove it, or choose another folder.") from error
        if not lines:
            return
        self._claim(self._read(_OBJECT, lines[0], 1))
        rows = lines[1:]
        if len(rows) != self._num_prompts:
            rows = rows[: len(rows) // self._chunk_size * self._chunk_size]
        self.findings = [self._read(_FINDING, row, number) for number, row in enumerate(rows, start=2)]
        self._size = sum(len(line) + 1 for line in [lines[0], *rows])

    def _read(self, form: Any, line: bytes, number: int) -> Any:
        try:
            return form.validate_python(unsealed(line))
        except (ValueError, RecursionError) as error:  # pydantic's errors are ValueErrors
            reason = one_line(error)
            raise ConfigError(
                f"{self.path}:{number} is damaged ({reason}): remove the file, or give overwrite=True, and "
                "pre-sampling starts again."
            ) from error

    def _claim(self, found: Mapping[str, Any]) -> None:
        names = [name for name in {**found, **self._record} if found.get(name) != self._record.get(name)]
        if names:
            shown = ", ".join(f"{name} ({found.get(name)!r} there, {self._record.get(name)!r} now)" for name in names)
            raise ConfigError(
                f"{self.path} holds the beginning of another pre-sampling: {shown}. Use the same settings, name "
                "another folder, or start again with overwrite=True."
            )


def _stored(result: Presampled) -> _Stored | None:
    if result.rehearsal is None:
        return None
    rollout = result.rehearsal
    return {
        "prompt_ids": list(rollout.prompt_ids),
        "completion_ids": list(rollout.completion_ids),
        "logprobs": list(rollout.logprobs),
    }
