"""The part of the run file that says what distribution the policy is led to."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from falign.errors import ConfigError
from falign.objectives import (
    BinaryConstraint,
    ExponentialReward,
    MomentConstraints,
    ProductTarget,
    Target,
    fit_moments,
)
from falign.runfile.base_config import FrozenModel

__all__ = ["BinaryConfig", "ExponentialConfig", "MomentsConfig", "ProductConfig", "TargetConfig", "without_fit"]


class BinaryConfig(FrozenModel):
    """The reference where its completions satisfy a constraint: one reward that is 0 or 1."""

    kind: Literal["binary"] = "binary"
    num_features: ClassVar[int] = 1
    needs_samples: ClassVar[bool] = False

    def build(self, features: Float[Tensor, "M 1"] | None = None) -> Target:
        """Return the target; it needs no samples."""
        return BinaryConstraint()


class ExponentialConfig(FrozenModel):
    """The reference times ``exp(r/β)``, of one reward."""

    kind: Literal["exponential"] = "exponential"
    beta: float = Field(gt=0)
    """β, in units of reward."""
    num_features: ClassVar[int] = 1
    needs_samples: ClassVar[bool] = False

    def build(self, features: Float[Tensor, "M 1"] | None = None) -> Target:
        """Return the target; it needs no samples."""
        return ExponentialReward(self.beta)


class MomentsConfig(FrozenModel):
    """The law nearest to the reference in which the means of some rewards are given ones."""

    kind: Literal["moments"] = "moments"
    moments: list[float] = Field(min_length=1)
    """The wanted mean of each reward, in order."""
    lambdas: list[float] | None = None
    """λ of an earlier fit; left out, they are fitted on samples of the reference before training."""

    @property
    def num_features(self) -> int:
        """How many rewards it reads."""
        return len(self.moments)

    @property
    def needs_samples(self) -> bool:
        """Whether λ have to be fitted on samples of the reference."""
        return self.lambdas is None

    def build(self, features: Float[Tensor, "M K"] | None = None) -> Target:
        """Return the target.

        Args:
            features: Rewards of M samples of the reference, on which λ are fitted where they are left out.

        Raises:
            ConfigError: λ and moments are not equally many, λ have to be fitted and there are no samples, or the
                moments cannot be reached.
        """
        if self.lambdas is None:
            return MomentConstraints(_fit(self.moments, features))
        if len(self.lambdas) != len(self.moments):
            raise ConfigError(
                f"objective.target: {len(self.lambdas)} lambdas for {len(self.moments)} moments; give one for each."
            )
        return MomentConstraints(tuple(self.lambdas))


FactorConfig = Annotated[BinaryConfig | MomentsConfig | ExponentialConfig, Field(discriminator="kind")]


class ProductConfig(FrozenModel):
    """Several targets at once; each reads the next rewards, in order."""

    kind: Literal["product"] = "product"
    targets: list[FactorConfig] = Field(min_length=1)
    """The factors."""

    @property
    def num_features(self) -> int:
        """How many rewards they read together."""
        return sum(target.num_features for target in self.targets)

    @property
    def needs_samples(self) -> bool:
        """Whether any of them has to be fitted on samples of the reference."""
        return any(target.needs_samples for target in self.targets)

    def build(self, features: Float[Tensor, "M K"] | None = None) -> Target:
        """Return the target.

        Args:
            features: Rewards of M samples of the reference, as under ``moments``. Moments are those of the product, so
                that they are fitted together, on samples weighted by the other factors.

        Raises:
            ConfigError: A factor cannot be built.
        """
        if features is None or not self.needs_samples:
            return ProductTarget(tuple(target.build() for target in self.targets))
        columns = features.split([target.num_features for target in self.targets], dim=-1)
        log_weights, wanted, fitted_columns = features.new_zeros(len(features)), list[float](), list[Tensor]()
        for target, column in zip(self.targets, columns, strict=True):
            if isinstance(target, MomentsConfig) and target.needs_samples:
                wanted, fitted_columns = wanted + target.moments, [*fitted_columns, column]
            else:
                log_weights = log_weights + target.build().log_score(column)
        lambdas = iter(_fit(wanted, torch.cat(fitted_columns, dim=-1), log_weights))
        factors = [
            MomentConstraints(tuple(next(lambdas) for _ in target.moments))
            if isinstance(target, MomentsConfig) and target.needs_samples
            else target.build()
            for target in self.targets
        ]
        return ProductTarget(tuple(factors))


TargetConfig = Annotated[BinaryConfig | MomentsConfig | ExponentialConfig | ProductConfig, Field(discriminator="kind")]
"""What the policy is led to: ``kind`` names one of these."""


def without_fit(
    target: BinaryConfig | MomentsConfig | ExponentialConfig | ProductConfig,
) -> BinaryConfig | MomentsConfig | ExponentialConfig | ProductConfig:
    """Return the target with λ = 0 where they are to be fitted: all that can be checked before there are samples."""
    if isinstance(target, ProductConfig):
        return target.model_copy(update={"targets": [without_fit(factor) for factor in target.targets]})
    if isinstance(target, MomentsConfig) and target.needs_samples:
        return target.model_copy(update={"lambdas": [0.0] * len(target.moments)})
    return target


def _fit(
    moments: list[float], features: Float[Tensor, "M K"] | None, log_weights: Float[Tensor, " M"] | None = None
) -> tuple[float, ...]:
    if features is None:
        raise ConfigError(
            f"objective.target.moments={moments!r} have to be fitted on samples of the reference, and there are none; "
            "give lambdas."
        )
    try:
        return tuple(fit_moments(features, moments, log_weights=log_weights).tolist())
    except ValueError as error:
        raise ConfigError(f"objective.target: {error}") from error
