"""Options of a judged evaluation, and the checks that need no model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falign.choices import require_choice
from falign.data.files import data_suffix
from falign.errors import ConfigError
from falign.evaluation.judged.benchmarks import JudgedBenchmark
from falign.judges import Endpoint
from falign.runs.loading import Named, result_folder

__all__ = ["JUDGMENTS_FILE", "JudgeOptions", "judged_folder"]

JUDGMENTS_FILE = "judgments.jsonl"
_UNSAFE = re.compile(r"[^\w.-]+")


def judged_folder(
    model: str, benchmark: str, *, mode: str | None = None, name: str | None = None, out: str | Path | None = None
) -> Path:
    """Return the folder for results: ``RUN/evaluation/NAME``, or `out`.

    Raises:
        ConfigError: The name is a path, or the results are not a run's and `out` is missing.
    """
    own = benchmark if mode is None else f"{benchmark}-{mode}"
    return result_folder(model, name or _UNSAFE.sub("-", own), None if out is None else Path(out))


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """All options of one judged evaluation; :func:`falign.evaluate_judge` documents them.

    Attributes:
        named: The model as it was given.
        model: Its path or name, or the path of a file of answers.
        out: Folder of the answers, the judgments and ``summary.json``.
    """

    named: Named
    model: str
    benchmark: JudgedBenchmark
    questions: str | Path
    judge: Endpoint
    mode: str
    baseline: str | Path | None
    references: str | Path | None
    template: str | Path | None
    engine: Any
    max_new_tokens: int
    temperature: float | None
    seed: int
    limit: int | None
    label: str
    dtype: str
    out: Path
    overwrite: bool
    trust_code: bool

    @property
    def given_answers(self) -> bool:
        """Whether the model is a file of answers."""
        return is_answers_file(self.model)

    def check(self) -> None:
        """Reject options that contradict each other, and results that would be overwritten.

        Raises:
            ConfigError: With the option and the remedy.
        """
        require_choice("mode", self.mode, self.benchmark.modes)
        if self.mode == "single" and self.baseline is not None:
            raise ConfigError("`baseline` applies only to mode='pairwise': leave it out, or set mode.")
        if self.given_answers and (self.engine is not None or self.temperature is not None):
            raise ConfigError(
                f"`engine` and `temperature` have no effect on {self.model}, which holds answers: leave them out."
            )
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if self.temperature is not None and self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature} must be at least 0.")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{self.out} is a file: give a folder.")
        if (self.out / "summary.json").exists() and not self.overwrite:
            raise ConfigError(
                f"{self.out} holds results: give another name or folder, or overwrite=True to judge again."
            )


def is_answers_file(model: str) -> bool:
    """Return whether a model is the path of a file of answers."""
    return data_suffix(Path(model)) in (".json", ".jsonl") and Path(model).is_file()
