"""Summaries of evaluations: ``evaluation/NAME/summary.json`` of a run, as they are written and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter, ValidationError

from falign.durable import checksum, write_whole
from falign.errors import ConfigError, without_passwords

__all__ = [
    "BestOfN",
    "Bin",
    "Calibration",
    "Estimate",
    "Frontier",
    "Ideal",
    "JudgeSummary",
    "Limit",
    "Point",
    "RewardSummary",
    "SampleSummary",
    "Scorer",
    "Summary",
    "check_file",
    "damaged",
    "read_evaluations",
    "read_summary",
    "write_summary",
]


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


def _as_written(estimate: Estimate) -> Any:
    """Return a value without an interval as a plain number."""
    return estimate.value if estimate.low is None and estimate.high is None else estimate.model_dump()


Estimated = Annotated[Estimate, BeforeValidator(_as_estimate), PlainSerializer(_as_written)]


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
    """Scores on a reward benchmark."""

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
    subsets: dict[str, int] = {}
    """Numbers of items by subset."""
    missing_subsets: tuple[str, ...] = ()
    """Missing subsets, without which there is no score."""
    scorers: dict[str, Scorer]
    record: dict[str, Any] = {}
    """All inputs that the numbers depend on."""
    files: dict[str, str] = {}
    """SHA-256 of each file of rows beside the summary."""

    @property
    def main_scorer(self) -> str:
        """The implicit reward, or the first scorer of a model without reference."""
        return "implicit_reward" if "implicit_reward" in self.scorers else next(iter(self.scorers), "")


class Point(_Form):
    """A run or a checkpoint: its divergence and its reward."""

    label: str = ""
    divergence: float | None
    reward: float | None
    divergence_interval: tuple[float, float] | None = None
    reward_interval: tuple[float, float] | None = None
    run: str | None = None
    folder: str | None = None


class BestOfN(_Form):
    """The best of n samples of the reference."""

    n: int
    divergence: float | None
    reward: float | None


class Ideal(_Form):
    """The closed-form optimum at one beta."""

    beta: float
    divergence: float | None
    own: float | None = None
    """The same in the divergence whose optimum it is."""
    reward: float | None
    effective_samples: float | None = None
    """Effective number of samples per prompt; if it is small, the estimate is unreliable."""


class Limit(_Form):
    """The point where all frontiers on samples of the reference end: the best sample of each prompt."""

    num_samples: int
    divergence: float | None
    reward: float


class Frontier(_Form):
    """Reward against divergence."""

    divergence: str
    points: tuple[Point, ...] = ()
    best_of_n: tuple[BestOfN, ...] = ()
    ideal: dict[str, tuple[Ideal, ...]] = {}
    limit: Limit | None = None


class SampleSummary(_Form):
    """Reward, divergence from the reference and diversity of a policy's completions."""

    kind: Literal["samples"]
    name: str
    model: str | None = None
    label: str = ""
    checkpoint: int | None = None
    reference: str | None = None
    divergence: str | None = None
    beta: float | None = None
    num_prompts: int
    num_completions: int
    """Completions per prompt."""
    pass_reward: float | None = None
    sampling: dict[str, Any] = {}
    source: str | None = None
    metrics: dict[str, Estimated]
    frontier: Frontier | None = None
    record: dict[str, Any] = {}
    """All inputs that the numbers depend on."""
    files: dict[str, str] = {}
    """SHA-256 of each file of rows beside the summary."""

    @property
    def measured_on(self) -> str:
        """The key of comparable evaluations: prompts, rewards, and the maximum length of samples."""
        inputs = [self.record.get(name) for name in ("prompts", "rewards", "max_new_tokens")]
        return json.dumps(inputs, sort_keys=True) if self.record else self.source or self.name


class JudgeSummary(_Form):
    """Scores of a model's answers by an LLM judge, or their win rate against a baseline's."""

    kind: Literal["judge"]
    name: str
    benchmark: str
    mode: str
    """``single``: scores; ``pairwise``: comparisons with the baseline."""
    model: str
    label: str = ""
    """The name of the model in its file of answers."""
    baseline: str | None = None
    judge: str
    """The model that the service names in its answers."""
    num_questions: int
    num_judgments: int
    """Turns that were judged; in both orders, if they are compared."""
    failures: int = 0
    """Turns without a verdict, which no metric counts."""
    categories: dict[str, int] = {}
    """Numbers of questions by category."""
    metrics: dict[str, Estimated]
    usage: dict[str, Any] = {}
    """Requests of the last call, and tokens and cost of all answers in the cache."""
    record: dict[str, Any] = {}
    """All inputs that the numbers depend on."""
    files: dict[str, str] = {}
    """SHA-256 of each file of rows beside the summary."""

    @property
    def measured_on(self) -> str:
        """The key of comparable evaluations: questions, judge with its template, mode and baseline's answers."""
        names = ("benchmark", "mode", "questions", "references", "baseline")
        inputs = {key: value for key, value in self.record.items() if key in names or key.startswith("judge.")}
        return json.dumps([self.judge, inputs], sort_keys=True)


Summary = RewardSummary | SampleSummary | JudgeSummary
"""A summary of any kind."""

_ANY = TypeAdapter[Summary](Annotated[Summary, Field(discriminator="kind")])


def read_evaluations(folder: Path) -> tuple[Summary, ...]:
    """Return the finished evaluations of a run, by name.

    Raises:
        ConfigError: One has another form.
    """
    found = map(read_summary, sorted((folder / "evaluation").glob("*/summary.json")))
    return tuple(summary for summary in found if summary is not None)


def read_summary(file: Path) -> Summary | None:
    """Return a summary; None if the file is missing, as when it was deleted after its folder was listed.

    Raises:
        ConfigError: It has another form.
    """
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


def write_summary(folder: Path, summary: Summary) -> None:
    """Write ``summary.json``, whole or not at all.

    Args:
        folder: The evaluation's folder.
        summary: Its ``files`` has the SHA-256 of each file of rows.
    """
    text = without_passwords(json.dumps(summary.model_dump(mode="json"), indent=1, ensure_ascii=False))
    write_whole(folder / "summary.json", text + "\n")


def check_file(folder: Path, name: str, summary: Summary) -> Path | None:
    """Return a file of rows that belongs to a summary; None if the summary does not name it.

    Args:
        folder: The evaluation's folder.
        name: Name of the file.
        summary: The evaluation's summary.

    Raises:
        ConfigError: The file is missing or has changed since the summary was written, or the summary has no checksums.
    """
    if not summary.files:
        raise damaged(folder / "summary.json", "it has no checksums")
    if name not in summary.files:
        return None
    file = folder / name
    if not file.is_file():
        raise damaged(file, "it is missing")
    if checksum(file) != summary.files[name]:
        raise damaged(file, "its content has changed since its summary was written")
    return file


def damaged(file: Path, reason: str) -> ConfigError:
    """Return the error for a file of an evaluation that has changed since it was written."""
    return ConfigError(f"{file} is damaged ({reason}): repeat its evaluation with overwrite=True.")
