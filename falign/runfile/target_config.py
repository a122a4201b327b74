"""The section of the run file for the target distribution of f-DPG."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from falign.errors import ConfigError
from falign.objectives import (
    BinaryConstraint,
    ExponentialReward,
    MomentConstraints,
    ProductTarget,
    Target,
    fit_moments,
)
from falign.registry import Registry
from falign.runfile.base_config import FrozenModel
from falign.runfile.members import OwnSection, union_of_kinds

__all__ = [
    "BinaryConfig",
    "ExponentialConfig",
    "MomentsConfig",
    "OwnTargetConfig",
    "ProductConfig",
    "TargetConfig",
]


class TargetSection(FrozenModel):
    """A target distribution of the run file."""

    kind: Any  # each section narrows it to its own name

    @property
    def num_features(self) -> int:
        """The number of rewards that it reads."""
        return self.unfitted().build().num_features

    @property
    def moments_to_fit(self) -> Sequence[float]:
        """The target means for which λ must be fitted on samples of the reference; empty if nothing is fitted."""
        return ()

    @property
    def needs_samples(self) -> bool:
        """True if λ must be fitted on samples of the reference."""
        return bool(self.moments_to_fit)

    def with_lambdas(self, lambdas: Sequence[float]) -> TargetSection:
        """Return the target with λ for :attr:`moments_to_fit`."""
        return self

    def unfitted(self) -> TargetSection:
        """Return the target with λ = 0 in place of fitted ones, for checks before there are samples."""
        return self.with_lambdas([0.0] * len(self.moments_to_fit))

    @abstractmethod
    def build(self, features: Float[Tensor, "M K"] | None = None) -> Target:
        """Return the target.

        Args:
            features: Rewards of M samples of the reference, to fit missing λ on.

        Raises:
            ConfigError: The numbers of λ and moments differ, λ must be fitted and there are no samples, or the moments
                cannot be reached.
        """


class BinaryConfig(TargetSection):
    """The reference where its completions satisfy a constraint: one reward that is 0 or 1."""

    kind: Literal["binary"] = "binary"

    @override
    def build(self, features: Float[Tensor, "M 1"] | None = None) -> Target:
        return BinaryConstraint()


class ExponentialConfig(TargetSection):
    """The reference times ``exp(r/β)``, of one reward."""

    kind: Literal["exponential"] = "exponential"
    beta: float = Field(gt=0)
    """β, in units of reward."""

    @override
    def build(self, features: Float[Tensor, "M 1"] | None = None) -> Target:
        return ExponentialReward(self.beta)


class MomentsConfig(TargetSection):
    """The distribution nearest to the reference under which some rewards have given means."""

    kind: Literal["moments"] = "moments"
    moments: list[float] = Field(min_length=1)
    """The target mean of each reward, in order."""
    lambdas: list[float] | None = None
    """λ of an earlier fit; by default they are fitted on samples of the reference before training."""

    @property
    @override
    def num_features(self) -> int:
        return len(self.moments)

    @property
    @override
    def moments_to_fit(self) -> Sequence[float]:
        return self.moments if self.lambdas is None else ()

    @override
    def with_lambdas(self, lambdas: Sequence[float]) -> TargetSection:
        return self.model_copy(update={"lambdas": list(lambdas)}) if self.lambdas is None else self

    @override
    def build(self, features: Float[Tensor, "M K"] | None = None) -> Target:
        if self.lambdas is None:
            return MomentConstraints(_fit(self.moments, features))
        if len(self.lambdas) != len(self.moments):
            raise ConfigError(
                f"objective.target: {len(self.lambdas)} lambdas for {len(self.moments)} moments; give one for each."
            )
        return MomentConstraints(tuple(self.lambdas))


class OwnTargetConfig(OwnSection, TargetSection, extra="allow"):
    """A target of your own: ``module:Name``, called with the other keys of the section."""

    @override
    def build(self, features: Float[Tensor, "M K"] | None = None) -> Target:
        return self.make(TARGETS, place="objective.target", protocol=Target)


FACTORS = {"binary": BinaryConfig, "moments": MomentsConfig, "exponential": ExponentialConfig}

if TYPE_CHECKING:
    FactorConfig = TargetSection
else:
    FactorConfig = union_of_kinds(FACTORS, own=OwnTargetConfig)


class ProductConfig(TargetSection):
    """Several targets at once; each reads the next rewards, in order."""

    kind: Literal["product"] = "product"
    targets: list[FactorConfig] = Field(min_length=1)
    """The factors."""

    @property
    @override
    def num_features(self) -> int:
        return sum(target.num_features for target in self.targets)

    @property
    @override
    def moments_to_fit(self) -> Sequence[float]:
        return [wanted for target in self.targets for wanted in target.moments_to_fit]

    @override
    def with_lambdas(self, lambdas: Sequence[float]) -> TargetSection:
        rest = iter(lambdas)
        targets = [target.with_lambdas([next(rest) for _ in target.moments_to_fit]) for target in self.targets]
        return self.model_copy(update={"targets": targets})

    @override
    def build(self, features: Float[Tensor, "M K"] | None = None) -> Target:
        # Moments hold under the product, so all are fitted together, on samples weighted by the other factors.
        if features is None or not self.needs_samples:
            return ProductTarget(tuple(target.build() for target in self.targets))
        columns = features.split([target.num_features for target in self.targets], dim=-1)
        fitted_columns = [column for each, column in zip(self.targets, columns, strict=True) if each.needs_samples]
        log_weights = features.new_zeros(len(features))
        for target, column in zip(self.targets, columns, strict=True):
            if not target.needs_samples:
                log_weights = log_weights + target.build().log_score(column)
        return self.with_lambdas(_fit(self.moments_to_fit, torch.cat(fitted_columns, dim=-1), log_weights)).build()


TARGETS: Registry[Any] = Registry("target", FACTORS | {"product": ProductConfig}, wanted="class or function")
"""Sections by kind; an own member is called with its settings and makes a :class:`falign.objectives.Target`."""

if TYPE_CHECKING:
    TargetConfig = TargetSection
else:
    TargetConfig = union_of_kinds(TARGETS.members, own=OwnTargetConfig)
"""The target distribution; ``kind`` names one of these."""


def _fit(
    moments: Sequence[float], features: Float[Tensor, "M K"] | None, log_weights: Float[Tensor, " M"] | None = None
) -> tuple[float, ...]:
    if features is None:
        raise ConfigError(
            f"objective.target.moments={list(moments)!r} must be fitted on samples of the reference, and there are "
            "none: give lambdas."
        )
    try:
        return tuple(fit_moments(features, list(moments), log_weights=log_weights).tolist())
    except ValueError as error:
        raise ConfigError(f"objective.target: {error}") from error
