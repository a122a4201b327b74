"""Options of a sample evaluation, and the checks that need no model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from falign.divergences import Divergence, get
from falign.errors import ConfigError
from falign.runfile import RunConfig
from falign.runfile.schedule_config import last_of
from falign.runs.loading import Given, is_run, result_folder
from falign.runs.named_code import import_from

__all__ = ["FILES", "ComparisonOptions", "PromptOptions", "SampleOptions", "samples_folder"]

FILES = ("samples.jsonl", "reference_samples.jsonl")
"""Rows of the policy's completions, and of the reference's."""

DEFAULT_DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon", "total_variation")
DEFAULT_COMPLETIONS = 8
DEFAULT_NEW_TOKENS = 128


def samples_folder(
    model: str, *, name: str | None = None, checkpoint: int | None = None, out: str | Path | None = None
) -> Path:
    """Return the folder for results: ``RUN/evaluation/NAME``, or `out`.

    Raises:
        ConfigError: The name is a path, or the results are a model's and `out` is missing.
    """
    default = "samples" if checkpoint is None else f"samples-{checkpoint}"
    return result_folder(model, name or default, None if out is None else Path(out))


class PromptOptions(NamedTuple):
    """The prompts to complete, under the names of the arguments of :func:`falign.evaluate_samples`."""

    prompts: Any = None
    split: str = "train"
    template: str | None = None
    chat: bool | None = None
    limit: int | None = None


class ComparisonOptions(NamedTuple):
    """The reference and the divergences to measure.

    Attributes:
        reference: A model; None for the run's own reference.
        divergences: Names of divergences to measure in addition to the default ones and the run's own.
        anchors: Whether to sample the reference too.
        num_completions: Completions of the reference per prompt; None for as many as the policy's.
    """

    reference: str | None = None
    divergences: tuple[str, ...] = ()
    anchors: bool = True
    num_completions: int | None = None


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """All options of one sample evaluation; :func:`falign.evaluate_samples` documents them.

    Attributes:
        out: Folder of ``samples.jsonl``, ``reference_samples.jsonl`` and ``summary.json``.
        given: Objects in memory that replace sections of the run file.
    """

    model: str
    prompts: PromptOptions
    rewards: Any
    pass_reward: float | None
    num_completions: int | None
    max_new_tokens: int | None
    temperature: float
    seed: int
    comparison: ComparisonOptions
    checkpoint: int | None
    prompts_per_batch: int
    dtype: str | None
    out: Path
    overwrite: bool
    given: Given | None = None
    trust_code: bool = False

    @property
    def samples_policy(self) -> bool:
        """True if samples come from the policy's own distribution, as divergences require."""
        return self.temperature == 1.0

    @property
    def label(self) -> str:
        """The name of the model or run in tables and plots, with the step of its checkpoint."""
        name = Path(self.model).name or self.model
        return name if self.checkpoint is None else f"{name}, step {self.checkpoint}"

    def check(self) -> None:
        """Reject options that contradict each other or the model, and results that would be overwritten.

        Raises:
            ConfigError: With the option and the remedy.
        """
        if self.checkpoint is not None and not is_run(self.model):
            raise ConfigError(f"`checkpoint` applies only to runs, and {self.model} is not a run folder: leave it out.")
        if self.comparison.num_completions is not None and not self.comparison.anchors:
            raise ConfigError("`num_reference_completions` has no effect with anchors=False: leave one of them out.")
        if self.dtype is not None and is_run(self.model):
            raise ConfigError(f"`dtype`: {self.model} is a run, which has its own (model.dtype): leave it out.")
        self._check_prompts()
        self._check_comparison()
        if self.pass_reward is not None and math.isnan(self.pass_reward):
            raise ConfigError("pass_reward=nan: no reward can be compared with NaN; give a number.")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{self.out} is a file: give a folder.")
        if (self.out / FILES[0]).exists() and not self.overwrite:
            raise ConfigError(
                f"{self.out} holds results: give another name or folder, or overwrite=True to sample again."
            )

    def _check_prompts(self) -> None:
        if self.prompts.prompts is not None:
            return
        needs_prompts = {"`template`": self.prompts.template, "`chat`": self.prompts.chat}
        if given := [name for name, value in needs_prompts.items() if value is not None]:
            raise ConfigError(
                f"{given[0]} applies only to `prompts`, and the run file says how the run's own prompts are read: "
                "leave it out, or give prompts=FILE."
            )
        if not is_run(self.model):
            raise ConfigError(f"{self.model} is not a run folder and has no prompts of its own: give prompts=FILE.")

    def _check_comparison(self) -> None:
        if not self.comparison.divergences:
            return
        if not is_run(self.model) and self.comparison.reference is None:
            raise ConfigError(f"`divergence`: {self.model} has no reference: give reference=MODEL.")
        if not self.samples_policy:
            raise ConfigError(
                f"`divergence` needs temperature=1: at {self.temperature:g} the samples come from another distribution "
                "than the policy's."
            )

    def measured_divergences(self, config: RunConfig | None) -> dict[str, Divergence]:
        """Return the divergences to measure, by name: the default ones, the run's own and the requested ones.

        Args:
            config: The run; None for a model.
        """
        own = None if config is None else last_of(config.objective.model_dump().get("divergence"))
        if any(":" in name for name in self.comparison.divergences):
            import_from(Path.cwd())
        fields = {name: "objective.divergence" for name in filter(None, [own])}
        fields |= dict.fromkeys(self.comparison.divergences, "divergence")
        found = [get(name, field=fields.get(name)) for name in dict.fromkeys((*DEFAULT_DIVERGENCES, *fields))]
        return {divergence.name: divergence for divergence in found}

    def sampling_settings(self, config: RunConfig | None) -> dict[str, Any]:
        """Return the settings that samples depend on; an online run's own evaluation settings are the defaults.

        Args:
            config: The run; None for a model.
        """
        online = None if config is None or config.prompts is None else config.rollout
        count = self.num_completions or (DEFAULT_COMPLETIONS if online is None else online.evaluation.completions)
        return {
            "num_completions": count,
            "num_reference_completions": self.comparison.num_completions or count,
            "max_new_tokens": self.max_new_tokens or (DEFAULT_NEW_TOKENS if online is None else online.max_new_tokens),
            "temperature": self.temperature,
            "ignore_stop": online is not None and online.ignore_stop,
            "seed": self.seed,
        }

    def passing_reward(self, config: RunConfig | None) -> float | None:
        """Return the least reward of a completion that passes; None if none is defined.

        An online run defines one for its own rewards; it means nothing for other rewards.
        """
        if self.pass_reward is not None or self.rewards is not None:
            return self.pass_reward
        return None if config is None or config.prompts is None else config.rollout.pass_reward
