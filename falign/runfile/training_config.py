"""The section ``training`` of a run file, and the check that its experiment trackers work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from falign.errors import ConfigError
from falign.runfile.base_config import FrozenModel
from falign.runfile.course_config import CallbacksConfig, EarlyStoppingConfig, KeepBestConfig, as_metric
from falign.scoring import DEFAULT_CHUNK_TOKENS

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["TrainingConfig", "check_trackers"]

NONE, ALL = "none", "all"

TABLES = frozenset({"mlflow", "tensorboard", "trackio", "wandb"})
"""Trackers that take completions as tables."""

PACKAGES = {
    "azure_ml": "azureml-core",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "flyte": "flytekit flytekitplugins-deck-standard",
}
"""Packages to install, for trackers that are not called like their package."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class TrainingConfig(FrozenModel):
    """Optimization settings; the names are those of ``transformers.TrainingArguments``."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """By default 1e-4 for an adapter, and 1e-6 with ``adapter: null``, which trains all weights."""
    per_device_train_batch_size: int = Field(default=4, ge=1)
    """Prompts per micro-batch, each with all its completions."""
    per_device_eval_batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    num_train_epochs: float = Field(default=1.0, gt=0)
    max_steps: int = -1
    """Optimizer steps, instead of ``num_train_epochs``; -1 by default."""
    optim: str = "adamw_torch"
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, ge=0)
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Options of the schedule: ``{min_lr_rate: 0.1}`` for ``cosine_with_min_lr``."""
    warmup_steps: float = Field(default=0.0, ge=0)
    """Steps, or a share of all steps if below 1."""
    master_weights: Literal["float32"] | None = None
    """``float32``: without an adapter, updates are added up in float32 copies of bfloat16 weights
    (``model.dtype: bfloat16``), where most would be lost to rounding."""
    gradient_checkpointing: bool = False
    logging_steps: int = Field(default=10, ge=1)
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations; with evaluation data, one always comes before the first and after the last step."""
    save_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; none by default."""
    save_total_limit: int | None = Field(default=2, ge=1)
    report_to: Annotated[list[str], BeforeValidator(_as_list)] = []
    """Trackers besides ``metrics.jsonl``: ``trackio``, ``wandb``, ``tensorboard`` ...; one, or a list."""
    log_completions: bool = False
    """In online runs: the completions of the last rollout and evaluation as a table in each tracker, at each log."""
    tokens_per_batch: int | None = Field(default=None, ge=2)
    """Limit of tokens per micro-batch, completions included, instead of a fixed number of prompts."""
    layout: Literal["auto", "tree", "padded"] = "auto"
    """``tree``: each prompt is computed once for all its completions; ``padded``: once for each; ``auto``: ``tree`` if
    a test before training shows that the model gives the same values."""
    chunk_tokens: int = Field(default=DEFAULT_CHUNK_TOKENS, ge=1)
    """Positions whose logits are computed at once; changes memory and speed, not results."""
    skip_bad: bool = False
    """Skip and count steps whose loss, gradient or reward is NaN or infinite, which otherwise stop the run."""
    save_minutes: float | None = Field(default=60.0, gt=0)
    """Longest time between checkpoints; ``null`` for none by time. One for which the disk has no room is left out."""
    early_stopping: EarlyStoppingConfig | None = None
    """End the run once a held-out metric no longer gets better: ``{metric: rewards/margins, patience: 3}``."""
    keep_best: Annotated[KeepBestConfig | None, BeforeValidator(as_metric)] = None
    """Keep the model with the best held-out metric instead of the last: ``rewards/margins``."""
    callbacks: CallbacksConfig = []
    """Callbacks of transformers: ``module:Class`` of your own, or ``{kind: module:Class, ...}`` with its arguments."""
    extra: dict[str, Any] = {}
    """Further arguments of ``transformers.TrainingArguments``, by name: ``{adam_beta1: 0.8, full_determinism: true}``.
    Names and types are those of the installed release; a setting that falign makes itself is refused with its field."""

    @field_validator("max_steps")
    @classmethod
    def _takes_steps(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError(
                "a run takes at least one optimizer step; leave it out (-1) to train for num_train_epochs. "
                "falign evaluate and falign score need no training"
            )
        return value

    @property
    def compares_models(self) -> bool:
        """Whether evaluations decide when the run ends, or which model it keeps."""
        return self.early_stopping is not None or self.keep_best is not None

    def check(self) -> None:
        """Refuse trackers, an optimizer, a schedule or extra arguments that do not work on this machine.

        Raises:
            ConfigError: One does not work; the message has the field and the reason.
        """
        from falign.runfile.optimization import check_names, check_optimizer, check_schedule
        from falign.runfile.training_arguments import check_effects

        check_trackers(self.report_to)
        if self.log_completions and ALL not in self.report_to and TABLES.isdisjoint(self.report_to):
            raise ConfigError(
                f"training.log_completions writes tables to {', '.join(sorted(TABLES))}, and training.report_to="
                f"{list(self.report_to)} has none of them: add one, or leave log_completions out. All completions are "
                "in completions.jsonl in any case."
            )
        check_names(self.optim, self.lr_scheduler_type)
        args = self.build(Path("run"), seed=0)
        check_effects(self, args)
        check_optimizer(args)
        check_schedule(args)

    def build(
        self,
        output_dir: Path,
        *,
        seed: int,
        gradient_accumulation_steps: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> TrainingArguments:
        """Return the arguments of the transformers trainer.

        Args:
            output_dir: The run folder.
            seed: Seed of the run.
            gradient_accumulation_steps: In online runs, where it follows from other fields: replaces the field.
            steps_per_epoch: In online runs: steps per pass over the prompts, to convert ``num_train_epochs``.
        """
        from transformers import TrainingArguments

        from falign.runfile.training_arguments import extra_arguments

        # Fields that transformers does not have, or that are translated below.
        own = {"eval_steps", "save_steps", "tokens_per_batch", "layout", "chunk_tokens", "gradient_checkpointing"}
        own |= {"skip_bad", "extra", "master_weights", "save_minutes", "early_stopping", "keep_best", "callbacks"}
        own.add("log_completions")
        arguments: dict[str, Any] = {
            **self.model_dump(exclude=own),
            "lr_scheduler_kwargs": dict(self.lr_scheduler_kwargs) or None,
            "output_dir": str(output_dir),
            "seed": seed,
            "save_strategy": "steps" if self.save_steps else "no",  # others come from falign.training.course
            "save_steps": self.save_steps or 500,
            "eval_strategy": "steps" if self.eval_steps else "no",
            "eval_steps": self.eval_steps,
            "remove_unused_columns": False,
            "label_names": [],
            "logging_nan_inf_filter": False,
            "ddp_find_unused_parameters": False,  # every trained parameter is used in every batch
            "log_level_replica": "error",  # as for the first process
            "disable_tqdm": True,  # falign.runs.progress draws its own bar
            **extra_arguments(self.extra, type(self).model_fields),
        }
        if gradient_accumulation_steps is not None:
            arguments["gradient_accumulation_steps"] = gradient_accumulation_steps
        if steps_per_epoch is not None:
            arguments["ignore_data_skip"] = True  # the checkpoint has the position in the prompts
            if self.max_steps <= 0:
                arguments["max_steps"] = math.ceil(self.num_train_epochs * steps_per_epoch)
        try:
            return TrainingArguments(**arguments)
        except ValueError as error:
            raise ConfigError(f"training: {error}") from error


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that cannot work, before anything is loaded.

    Raises:
        ConfigError: A tracker is unknown, or its package is not installed.
    """
    if not names:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
        is_flytekit_available,
    )

    known = {NONE, ALL, *INTEGRATION_TO_CALLBACK}
    if unknown := sorted(set(names) - known):
        raise ConfigError(f"training.report_to={unknown[0]!r} is unknown: choose from {', '.join(sorted(known))}.")
    if len(names) > 1 and (alone := {NONE, ALL} & set(names)):
        raise ConfigError(f"training.report_to={list(names)}: {min(alone)} excludes other trackers; leave them out.")
    available = {NONE, ALL, *get_available_reporting_integrations()}
    if is_flytekit_available():  # missing from the list of transformers
        available.add("flyte")
    for name in sorted(set(names) - available):
        raise ConfigError(f"training.report_to={name!r}: {_reason(name)}, or leave it out.")


def _reason(name: str) -> str:
    """Return why a tracker cannot work, and the remedy."""
    if name == "kubeflow":
        return "no Kubeflow trainer is running (KUBEFLOW_TRAINER_SERVER_URL is not set). Start the run as its job"
    from transformers.integrations.integration_utils import is_azureml_available

    if name == "azure_ml" and is_azureml_available():
        return "the package mlflow is installed, which reports to Azure instead. Use mlflow"
    packages = PACKAGES.get(name, name)
    return f"it needs {' and '.join(packages.split())}. Install what is missing (pip install {packages})"
