"""What pre-sampling has found so far, on disk, so that a call that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from falign.errors import ConfigError
from falign.rollouts.presampling import Presampled

__all__ = ["Finding", "PresamplingJournal"]


class _Stored(TypedDict):
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]


class Finding(NamedTuple):
    """What is kept of one prompt.

    Attributes:
        num_correct: How many of its completions are correct.
        rehearsal: ``prompt_ids``, ``completion_ids`` and ``logprobs`` of the completion to rehearse; None to explore.
    """

    num_correct: int
    rehearsal: _Stored | None


_OBJECT, _FINDING = TypeAdapter(dict[str, Any]), TypeAdapter(Finding)


class PresamplingJournal:
    """A file of findings in the order of the prompts; its first line is what they depend on.

    Args:
        path: The file; made with the first finding.
        record: What the findings depend on, by name; plain values.
        chunk_size: Findings come in chunks of so many; of a chunk that is not whole nothing is taken.

    Raises:
        ConfigError: The file depends on something else.
    """

    def __init__(self, path: Path, *, record: Mapping[str, Any], chunk_size: int) -> None:
        self.path, self._record = path, json.loads(json.dumps(record))
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
            if whole:
                self._claim(_OBJECT.validate_json(whole[0]))
            rows = whole[1:]
            rows = rows[: len(rows) // chunk_size * chunk_size]
            self.findings = [_FINDING.validate_json(row) for row in rows]
        except (OSError, ValidationError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{path} is damaged ({reason}): remove it, and pre-sampling starts anew.") from error
        if content:  # what a killed process has left of a line or a chunk goes
            os.truncate(path, sum(map(len, [*whole[:1], *rows])))
        self._begun = bool(whole)

    def append(self, results: Sequence[Presampled]) -> None:
        """Write the findings of a chunk; they survive the process from here on."""
        found = [Finding(result.num_correct, _stored(result)) for result in results]
        head = [] if self._begun else [self._record]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in [*head, *(each._asdict() for each in found)])
        self.findings += found
        self._begun = True

    def _claim(self, found: Mapping[str, Any]) -> None:
        names = [name for name in {**found, **self._record} if found.get(name) != self._record.get(name)]
        if names:
            shown = ", ".join(f"{name} ({found.get(name)!r} there, {self._record.get(name)!r} now)" for name in names)
            raise ConfigError(
                f"{self.path} holds the beginning of another pre-sampling: {shown}. Go on with the same settings, name "
                "another folder, or remove it."
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
