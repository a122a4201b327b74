"""The results of a run: ``summary.json`` and ``samples.json`` in its folder."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from falign.errors import ConfigError
from falign.runs.folder import RunFolder

__all__ = ["Answered", "RunSummary"]


class Answered(BaseModel):
    """One prompt of the run file, answered before and after training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    before: str
    after: str


class _Metrics(BaseModel):
    """``summary.json``."""

    before: dict[str, float]
    after: dict[str, float]


_ANSWERS = TypeAdapter(list[Answered])


class RunSummary(NamedTuple):
    """The results of a run that has ended.

    Attributes:
        folder: The run folder.
        before: Held-out metrics before the first step; empty without evaluation data.
        after: The same after the last step.
        samples: The prompts of the section ``sampling``, answered before and after.
    """

    folder: RunFolder
    before: dict[str, float]
    after: dict[str, float]
    samples: list[Answered]

    @classmethod
    def read(cls, folder: RunFolder) -> RunSummary:
        """Return the results of a run.

        Raises:
            ConfigError: It has not ended, or a file is damaged.
        """
        metrics = _checked(folder, "summary.json", _Metrics.model_validate)
        return cls(folder, metrics.before, metrics.after, _checked(folder, "samples.json", _ANSWERS.validate_python))

    def write(self) -> None:
        """Write both files; ``summary.json`` comes last and marks the run as finished."""
        self.folder.write_json("samples.json", [each.model_dump() for each in self.samples])
        self.folder.write_json("summary.json", {"before": self.before, "after": self.after})


def _checked(folder: RunFolder, name: str, validate: Any) -> Any:
    content = folder.read_json(name)
    try:
        return validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"{folder.path / name} does not have the form that runs write ({place}: {first['msg']}): restore it, or "
            "run again."
        ) from error
