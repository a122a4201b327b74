"""The results of a run: ``summary.json`` and ``samples.json`` in its folder."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from falign.errors import ConfigError
from falign.runs.folder import RunFolder

__all__ = ["Answered", "Best", "RunSummary"]


class Answered(BaseModel):
    """One prompt of the run file, answered before and after training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    before: str
    after: str


class Best(BaseModel):
    """The best model of a run, which the run has kept instead of its last one.

    Attributes:
        metric: The held-out metric by which it is the best.
        value: Its value.
        step: The step after which the model had it.
        last_step: The last step of the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    value: float
    step: int
    last_step: int

    def __str__(self) -> str:
        return f"of step {self.step} of {self.last_step}, with the best held-out {self.metric} ({self.value:.4g})"


class _Metrics(BaseModel):
    """``summary.json``."""

    before: dict[str, float]
    after: dict[str, float]
    best: Best | None = None


_ANSWERS = TypeAdapter(list[Answered])


class RunSummary(NamedTuple):
    """The results of a run that has ended.

    Attributes:
        folder: The run folder.
        before: Held-out metrics before the first step; empty without evaluation data.
        after: The same of the model that the run has kept: after the last step, or at the best one.
        samples: The prompts of the section ``sampling``, answered before and after.
        best: The best model, if the run has kept that.
    """

    folder: RunFolder
    before: dict[str, float]
    after: dict[str, float]
    samples: list[Answered]
    best: Best | None = None

    @classmethod
    def read(cls, folder: RunFolder) -> RunSummary:
        """Return the results of a run.

        Raises:
            ConfigError: It has not ended, or a file is damaged.
        """
        metrics = _checked(folder, "summary.json", _Metrics.model_validate)
        samples = _checked(folder, "samples.json", _ANSWERS.validate_python)
        return cls(folder, metrics.before, metrics.after, samples, metrics.best)

    def write(self) -> None:
        """Write both files; ``summary.json`` comes last and marks the run as finished."""
        self.folder.write_json("samples.json", [each.model_dump() for each in self.samples])
        best = {} if self.best is None else {"best": self.best.model_dump()}
        self.folder.write_json("summary.json", {"before": self.before, "after": self.after, **best})


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
