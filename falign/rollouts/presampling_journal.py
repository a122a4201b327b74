"""The journal of pre-sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from falign.rollouts.journal import Journal
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


_FINDING = TypeAdapter(Finding)


class PresamplingJournal(Journal[Finding]):
    """A journal of findings in the order of the prompts.

    Args:
        path: As for :class:`Journal`.
        record: As for :class:`Journal`.
        chunk_size: As for :class:`Journal`.
        num_prompts: Total number of findings.
        overwrite: As for :class:`Journal`.

    Raises:
        ConfigError: The file is damaged, has other inputs, or is a link.
    """

    def __init__(
        self, path: Path, *, record: Mapping[str, Any], chunk_size: int, num_prompts: int, overwrite: bool = False
    ) -> None:
        super().__init__(
            path,
            _FINDING.validate_python,
            record=record,
            chunk_size=chunk_size,
            total=num_prompts,
            work="pre-sampling",
            overwrite=overwrite,
            plain=Finding._asdict,
        )

    @property
    def findings(self) -> list[Finding]:
        """The findings so far."""
        return self.entries

    def append(self, results: Sequence[Presampled]) -> None:
        """Write the findings of a chunk to the disk, where they survive a kill of the process."""
        self.extend([Finding(result.num_correct, _stored(result)) for result in results])


def _stored(result: Presampled) -> _Stored | None:
    if result.rehearsal is None:
        return None
    rollout = result.rehearsal
    return {
        "prompt_ids": list(rollout.prompt_ids),
        "completion_ids": list(rollout.completion_ids),
        "logprobs": list(rollout.logprobs),
    }
