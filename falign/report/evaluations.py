"""Readers of ``evaluation/NAME/summary.json`` in a run, in the forms of ``falign evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from falign.errors import ConfigError

__all__ = ["Bin", "Calibration", "Estimate", "Frontier", "RewardSummary", "SampleSummary", "Scorer", "read_evaluations"]


class _Form(BaseModel):
    """A section of an evaluation's summary; keys without a field here are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Estimate(_Form):
    """A value with its interval, if there is one."""

    value: float | None
    low: float | None = None
    high: float | None = None


def _as_estimate(value: Any) -> Any:
    return {"value": value} if value is None or isinstance(value, int | float) else value


Estimated = Annotated[Estimate, BeforeValidator(_as_estimate)]


class Bin(_Form):
    """Items of similar confidence."""

    confidence: float | None
    accuracy: float | None
    count: int


class Calibration(_Form):
    """The gap between confidence and accuracy."""

    ece: Estimated
    brier: Estimated
    bins: tuple[Bin, ...]


class Scorer(_Form):
    """The results of one scoring method: ``score``, and the sections or subsets of the benchmark."""

    scores: dict[str, Estimated]
    calibration: Calibration | None = None

    @property
    def whole(self) -> str:
        """The name of the benchmark's score; the plain mean if a required subset is missing."""
        return next((name for name in ("score", "accuracy") if name in self.scores), next(iter(self.scores), ""))


class RewardSummary(_Form):
    """A summary of ``falign evaluate rewards``."""

    kind: Literal["rewards"]
    name: str
    benchmark: str
    source: str | None = None
    model: str | None = None
    reference: str | None = None
    divergence: str | None = None
    beta: float | None = None
    num_items: int
    skipped: dict[str, int] = {}
    missing_subsets: tuple[str, ...] = ()
    """Missing subsets, without which there is no score."""
    scorers: dict[str, Scorer]

    @property
    def main_scorer(self) -> str:
        """The implicit reward, or the first scorer of a model without reference."""
        return "implicit_reward" if "implicit_reward" in self.scorers else next(iter(self.scorers), "")


class Point(_Form):
    """A run or a checkpoint: its divergence and its reward."""

    label: str = ""
    divergence: float | None
    reward: float | None
    reward_interval: tuple[float, float] | None = None


class BestOfN(_Form):
    """The best of n samples of the reference."""

    n: int
    divergence: float | None
    reward: float | None


class Ideal(_Form):
    """The closed-form optimum at one beta."""

    beta: float
    divergence: float | None
    reward: float | None
    effective_samples: float | None = None
    """The effective number of samples per prompt; if it is small, the estimate is unreliable."""


class Frontier(_Form):
    """Reward against divergence."""

    divergence: str
    points: tuple[Point, ...] = ()
    best_of_n: tuple[BestOfN, ...] = ()
    ideal: dict[str, tuple[Ideal, ...]] = {}


class SampleSummary(_Form):
    """A summary of ``falign evaluate samples``."""

    kind: Literal["samples"]
    name: str
    model: str | None = None
    reference: str | None = None
    divergence: str | None = None
    beta: float | None = None
    num_prompts: int
    num_completions: int
    """Completions per prompt."""
    sampling: dict[str, Any] = {}
    source: str | None = None
    metrics: dict[str, Estimated]
    frontier: Frontier | None = None
    record: dict[str, Any] = {}

    @property
    def measured_on(self) -> str:
        """The key of comparable evaluations: prompts, rewards, and the maximum length of samples."""
        told = [self.record.get(name) for name in ("prompts", "rewards", "max_new_tokens")]
        return json.dumps(told, sort_keys=True) if self.record else self.source or self.name


_ANY = TypeAdapter[RewardSummary | SampleSummary](Annotated[RewardSummary | SampleSummary, Field(discriminator="kind")])


def read_evaluations(folder: Path) -> tuple[RewardSummary | SampleSummary, ...]:
    """Return the finished evaluations of a run, by name.

    Raises:
        ConfigError: One has another form.
    """
    found = map(_read, sorted((folder / "evaluation").glob("*/summary.json")))
    return tuple(summary for summary in found if summary is not None)


def _read(file: Path) -> RewardSummary | SampleSummary | None:
    """Return a summary; None if it was deleted after its folder was listed."""
    remedy = "remove its folder, and evaluate again."
    try:
        return _ANY.validate_python(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"{file}: {place} does not have the form of an evaluation ({first['msg']}): {remedy}"
        ) from error
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is damaged ({error}): {remedy}") from error
