"""The section ``rewards`` of the run file: a list of models, distinguished by ``kind``.

The sections of built-in rewards are made from their signatures and docstrings in :mod:`falign.rewards.built_in`.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_serializer, model_validator
from typing_extensions import override

from falign.errors import ConfigError
from falign.registry import Registry
from falign.rewards import OwnFunction, Reward, RewardSum, TimedFunction, WeightedReward
from falign.rewards.base import DatedReward, LoadsModel, ReadsFile
from falign.rewards.built_in import REWARDS
from falign.rewards.transforms import TRANSFORMS, RewardTransform
from falign.runfile.base_config import FrozenModel, PythonObject, refusals
from falign.runfile.members import OwnSection, section_of, union_of_kinds

__all__ = ["FunctionConfig", "OwnRewardConfig", "PythonRewardConfig", "RewardConfig", "build_rewards"]


class TransformSection(FrozenModel):
    """A transform of a reward: the arguments of its function."""

    kind: Any  # each section narrows it to its own name

    @abstractmethod
    def build(self) -> RewardTransform:
        """Return the transform.

        Raises:
            FalignError: A file is missing or has no rewards, or a value is out of its range.
        """


class BuiltInTransform(TransformSection):
    """A built-in transform."""

    member: ClassVar[Callable[..., RewardTransform]]

    @override
    def build(self) -> RewardTransform:
        names = type(self).model_fields.keys() - TransformSection.model_fields.keys()
        with refusals("rewards"):
            return type(self).member(**{name: getattr(self, name) for name in names})


class OwnTransformConfig(OwnSection, TransformSection, extra="allow"):
    """A transform of your own: ``module:Name``, called with the other keys of the section."""

    @override
    def build(self) -> RewardTransform:
        return self.make(TRANSFORMS, place="rewards.transform", protocol=RewardTransform)


def _made_section(registry: Registry[Any], kind: str, base: type[Any]) -> type[Any]:
    section = section_of(registry.get(kind), kind=kind, base=base)
    section.member = staticmethod(registry.get(kind))
    if issubclass(section, TransformSection):  # kinds of other families have the same names
        section.__name__ = section.__qualname__ = section.__name__.replace("Config", "TransformConfig")
    return section


def _marked(section: FrozenModel, marker: type[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, mark and value of the arguments that have a mark."""
    for name, field in type(section).model_fields.items():
        yield from ((name, mark, getattr(section, name)) for mark in field.metadata if isinstance(mark, marker))


if TYPE_CHECKING:
    TransformConfig = TransformSection
else:
    TransformConfig = union_of_kinds(
        {kind: _made_section(TRANSFORMS, kind, BuiltInTransform) for kind in TRANSFORMS.names()},
        own=OwnTransformConfig,
    )
"""The transform of a reward; ``kind`` names one of these."""


class RewardSection(FrozenModel):
    """Fields of all rewards."""

    kind: Any  # each section narrows it to its own name
    name: str | None = None
    """Logged as ``reward/<name>``; by default the kind, or the function's name."""
    weight: float = 1.0
    """Factor in the sum; 0 only logs it."""
    transform: TransformConfig | None = None
    """A function of the reward, calibrated on samples of the reference, that counts in its place."""

    @property
    def default_name(self) -> str:
        """The name of the reward if none is given."""
        return self.kind

    def models_that_read_ids(self) -> Iterator[tuple[str, str]]:
        """Return the field and path of each model that reads the policy's token ids."""
        yield from ()

    def model_paths(self) -> Iterator[str]:
        """Return the paths of the models that it loads."""
        yield from ()

    def data_paths(self) -> Iterator[Path]:
        """Return the paths of the files that it reads; that of a transform says itself how to make it."""
        yield from ()

    @abstractmethod
    def build(self) -> Reward:
        """Return the reward.

        Raises:
            FalignError: It cannot be imported or loaded, or its fields contradict each other.
        """

    def build_at(self, date: datetime | None) -> Reward:
        """Return the reward, with the date that its chat template writes; None is today."""
        reward = self.build()
        if date is not None and isinstance(reward, DatedReward):
            reward.fix_date(date)
        return reward


class BuiltInSection(RewardSection):
    """A built-in reward: the arguments of its function."""

    member: ClassVar[Callable[..., Reward]]

    @override
    def models_that_read_ids(self) -> Iterator[tuple[str, str]]:
        yield from ((name, path) for name, mark, path in _marked(self, LoadsModel) if mark.reads_policy_ids)

    @override
    def model_paths(self) -> Iterator[str]:
        yield from (path for _, _, path in _marked(self, LoadsModel))

    @override
    def data_paths(self) -> Iterator[Path]:
        yield from (Path(path) for _, _, path in _marked(self, ReadsFile) if path is not None)

    @override
    def build(self) -> Reward:
        names = type(self).model_fields.keys() - RewardSection.model_fields.keys()
        with refusals("rewards"):
            return type(self).member(**{name: getattr(self, name) for name in names})


class FunctionConfig(RewardSection):
    """A function of your own, in falign's form ``(prompts, completions, **columns) -> list``, in TRL's or verl's."""

    kind: Literal["function"] = "function"
    function: str
    """``module:function``; it may be ``async``."""
    form: Literal["falign", "trl", "verl"] = "falign"
    """The calling convention: ``trl`` gives completions of conversations as lists of one message, ``verl`` calls
    ``compute_score(data_source, solution_str, ground_truth, extra_info)`` for each completion."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds per completion. The function is then called for one completion at a time, in separate processes;
    without it, for all at once, in this process."""
    failed: float | None = 0.0
    """With ``timeout``: value of a completion that timed out, or raised and was counted; null leaves it out."""
    errors: Literal["stop", "count"] = "stop"
    """With ``timeout``: ``count`` counts exceptions instead of stopping the run."""

    @model_validator(mode="after")
    def _needs_a_timeout(self) -> FunctionConfig:
        given = sorted({"failed", "errors"} & self.model_fields_set)
        if self.timeout is None and given:
            raise ValueError(f"{given[0]} applies to single completions, so it needs a timeout")
        return self

    @model_serializer(mode="wrap")
    def _without_timeout_fields(self, handler: Any) -> dict[str, Any]:
        dropped = frozenset[str]() if self.timeout is not None else frozenset({"failed", "errors"})
        return {name: value for name, value in handler(self).items() if name not in dropped}

    @property
    @override
    def default_name(self) -> str:
        return self.function.rpartition(":")[2]

    @override
    def build(self) -> Reward:
        if self.timeout is None:
            return OwnFunction(self.function, self.form)
        return TimedFunction(
            self.function, timeout=self.timeout, failed=self.failed, errors=self.errors, form=self.form
        )


class OwnRewardConfig(OwnSection, RewardSection, extra="allow"):
    """A reward of your own with settings: ``module:Name``, called with the other keys of the section."""

    @property
    @override
    def default_name(self) -> str:
        return self.kind.rpartition(":")[2]

    @override
    def build(self) -> Reward:
        if "completions" in inspect.signature(REWARDS.get(self.kind, field="rewards.kind")).parameters:
            raise ConfigError(f"rewards.kind={self.kind!r} is a reward itself: write function: {self.kind}.")
        return self.make(REWARDS, place="rewards", protocol=Reward)


class PythonRewardConfig(PythonObject, RewardSection):
    """The record of a reward function or object in memory."""

    name: str  # pyright: ignore[reportIncompatibleVariableOverride]
    """As for other rewards; by default the name of the function or the class."""
    form: Literal["falign", "trl", "verl"] = "falign"
    """As for ``function``."""

    def build(self) -> Reward:
        """Return the reward.

        Raises:
            ConfigError: The object is not in memory.
        """
        given = self.given(f"reward {self.name}")
        return OwnFunction(self.name, self.form, given) if inspect.isroutine(given) else given


if TYPE_CHECKING:
    RewardConfig = RewardSection
else:
    RewardConfig = union_of_kinds(
        {
            "function": FunctionConfig,
            **{kind: _made_section(REWARDS, kind, BuiltInSection) for kind in REWARDS.names()},
            "python": PythonRewardConfig,
        },
        default="function",
        own=OwnRewardConfig,
    )
"""One reward of the list ``rewards``; ``kind`` names one of these, and the first is the default."""


def build_rewards(
    configs: Sequence[RewardConfig], *, date: datetime | None = None, outcome: str | None = None
) -> RewardSum:
    """Return the weighted sum of the rewards of a run file.

    Args:
        configs: The list ``rewards``.
        date: The date that chat templates write; None is today.
        outcome: Name of the reward that decides what passes; see :class:`falign.rewards.RewardSum`.

    Raises:
        ConfigError: The list is empty, two rewards have the same name, or one cannot be built.
    """
    return RewardSum(
        tuple(
            WeightedReward(
                config.name or config.default_name,
                config.build_at(date),
                config.weight,
                None if config.transform is None else config.transform.build(),
            )
            for config in configs
        ),
        outcome,
    )
