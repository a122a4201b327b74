"""The rules that steer a run besides its number of steps: callbacks, early stopping, and the best model."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator
from typing_extensions import override

from falign.choices import shown
from falign.errors import ConfigError
from falign.raised import calling
from falign.registry import Registry
from falign.runfile.base_config import FrozenModel, PythonObject
from falign.runfile.members import OwnSection, call_with_settings, union_of_kinds

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["CallbacksConfig", "EarlyStoppingConfig", "KeepBestConfig", "OwnCallbackConfig", "PythonCallbackConfig"]

CALLBACKS: Registry[Any] = Registry("callback", {}, wanted="subclass of transformers.TrainerCallback")


class CallbackSection(FrozenModel):
    """A callback of transformers."""

    kind: Any  # each section narrows it to its own name

    @abstractmethod
    def build(self, field: str) -> TrainerCallback:
        """Return the callback.

        Args:
            field: The path of the section, for messages.

        Raises:
            ConfigError: It cannot be imported or made, or is not a callback of transformers.
        """


class OwnCallbackConfig(OwnSection, CallbackSection, extra="allow"):
    """A callback of your own: ``module:Class``, called with the other keys of the section."""

    @override
    def build(self, field: str) -> TrainerCallback:
        from transformers import TrainerCallback

        member = CALLBACKS.get(self.kind, field=f"{field}.kind")
        made = call_with_settings(member, self.model_extra or {}, name=self.kind, place=field)
        if not isinstance(made, TrainerCallback):
            raise ConfigError(
                f"{field}.kind={self.kind!r} makes a {type(made).__name__}, which is not a "
                "transformers.TrainerCallback: derive its class from that."
            )
        return made


class PythonCallbackConfig(PythonObject, CallbackSection):
    """A callback that a program gave as an object."""

    @override
    def build(self, field: str) -> TrainerCallback:
        return self.given(field)


def _of_object(value: Any) -> Any:
    """Return the section of a callback: of its name, an object, or the section itself."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, Mapping | FrozenModel):
        return value
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    if isinstance(value, type) and issubclass(value, TrainerCallback):
        value = value()
    if not isinstance(value, TrainerCallback):
        raise ValueError(f"{shown(value)} is not a transformers.TrainerCallback: give one, or module:Class")
    # An object that has seen a run differs from a new one, so only its code and its arguments are compared.
    arguments: dict[str, Any] = {}
    if isinstance(value, ExportableState):
        with calling("callback", value):
            arguments = value.state().get("args", {})
    return PythonCallbackConfig.of(value, hashed=functools.partial(type(value), **arguments))


def _each(value: Any) -> Any:
    several = value if isinstance(value, list | tuple) else [value]
    return [_of_object(each) for each in several]


if TYPE_CHECKING:
    CallbacksConfig = list[CallbackSection]
else:
    CallbacksConfig = Annotated[
        list[union_of_kinds({"python": PythonCallbackConfig}, own=OwnCallbackConfig)], BeforeValidator(_each)
    ]
"""Callbacks: ``module:Class``, sections with ``kind`` and arguments, or objects of a program."""

FALLS = frozenset({"loss", "nll", "kl", "perplexity", "errors", "timeouts"})
RISES = frozenset({"accuracies", "accuracy", "mean_token_accuracy", "margins", "reward", "win_rate"})
"""Last parts of the names of metrics of which less, or more, is better."""


def _rises(metric: str) -> bool | None:
    """Return whether more of a metric is better; None if its name does not tell."""
    parts = metric.split("/")
    if parts[-1] in FALLS or any(part.startswith("divergence") for part in parts):
        return False
    return True if parts[-1] in RISES or parts[-1].startswith("pass@") else None


class KeepBestConfig(FrozenModel):
    """A held-out metric by which models of a run are compared."""

    metric: str = Field(min_length=1)
    """As in the held-out lines of ``metrics.jsonl``, with or without ``eval_``: ``rewards/margins``."""
    greater_is_better: bool | None = None
    """Must be set if the name does not tell: less ``loss`` is better, and a greater ``reward``."""

    @field_validator("metric")
    @classmethod
    def _without_prefix(cls, value: str) -> str:
        return value.removeprefix("eval_")

    @model_validator(mode="after")
    def _has_direction(self) -> KeepBestConfig:
        if self.greater_is_better is None and _rises(self.metric) is None:
            raise ValueError(
                f"the name {self.metric!r} does not tell whether more is better: set greater_is_better to true or false"
            )
        return self

    @property
    def rises(self) -> bool:
        """Whether more of the metric is better."""
        return bool(_rises(self.metric) if self.greater_is_better is None else self.greater_is_better)


class EarlyStoppingConfig(KeepBestConfig):
    """End the run once a held-out metric has stopped getting better."""

    patience: int = Field(default=3, ge=1)
    """Evaluations in a row without improvement after which the run ends."""
    min_delta: float = Field(default=0.0, ge=0)
    """Smallest change that counts as improvement."""


def as_metric(value: Any) -> Any:
    """Read a bare name of a metric as the section with default settings."""
    return {"metric": value} if isinstance(value, str) else value
