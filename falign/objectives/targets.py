"""Energy-based targets ``p(y) ∝ π_ref(y) exp(score(y))``, as functions of features of each completion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from falign.divergences.base import numbers
from falign.numeric_fields import NumericFields

__all__ = ["BinaryConstraint", "ExponentialReward", "MomentConstraints", "ProductTarget", "Target"]


@runtime_checkable
class Target(Protocol):
    """A distribution known up to its normalizer: ``P = π_ref exp(score)``, and ``p = P/Z``.

    Attributes:
        has_zeros: True if completions that the reference can produce may have ``P = 0``.
        num_features: K, the number of features that it reads of each completion.
    """

    @property
    def has_zeros(self) -> bool: ...

    @property
    def num_features(self) -> int: ...

    def log_score(self, features: Shaped[Tensor, "N K"]) -> Float[Tensor, " N"]:
        """Return ``log P/π_ref`` of each completion.

        Args:
            features: The features that the target reads, shape (N, K).

        Returns:
            Shape (N,), nats; -inf where ``P = 0``.
        """
        ...


@dataclass(frozen=True)
class BinaryConstraint:
    """``p = π_ref(· | b = 1)``: the reference restricted to completions that satisfy a constraint.

    Source:
        Khalifa et al., GDC (arXiv:2012.11635), pointwise constraints.

    Example:
        >>> BinaryConstraint().log_score(torch.tensor([[1.0], [0.0]]))
        tensor([0., -inf])
    """

    has_zeros = True
    num_features = 1

    def log_score(self, features: Shaped[Tensor, "N 1"]) -> Float[Tensor, " N"]:
        """Return 0 where the feature is 1, and -inf where it is 0.

        Args:
            features: 1 where the constraint holds, else 0, shape (N, 1).

        Returns:
            Shape (N,); NaN where the feature is NaN.
        """
        holds = _columns(self, features)[:, 0]
        score = torch.zeros_like(holds).masked_fill(holds <= 0.5, -math.inf)
        return score.masked_fill(holds.isnan(), math.nan)


@dataclass(frozen=True)
class MomentConstraints(NumericFields):
    """``p ∝ π_ref exp(λ·φ)``: of all distributions with ``E_p[φ] = μ``, the nearest to the reference in reverse KL.

    Attributes:
        lambdas: λ, one number per feature; :func:`falign.objectives.fit_moments` finds λ for given moments.

    Raises:
        ValueError: λ is empty, or a value is NaN or infinite.

    Source:
        Khalifa et al., GDC (arXiv:2012.11635), distributional constraints.

    Example:
        >>> MomentConstraints((2.0, -1.0)).log_score(torch.tensor([[0.5, 1.0], [1.0, 0.0]]))
        tensor([0., 2.])
    """

    lambdas: tuple[float, ...]
    has_zeros = False

    def __post_init__(self) -> None:
        if not self.lambdas or not all(map(math.isfinite, self.lambdas)):
            raise ValueError(f"lambdas={self.lambdas!r} must be one finite number for each feature.")

    @property
    def num_features(self) -> int:
        """Number of multipliers λ."""
        return len(self.lambdas)

    def log_score(self, features: Shaped[Tensor, "N K"]) -> Float[Tensor, " N"]:
        """Return ``λ·φ``.

        Args:
            features: φ, shape (N, K).

        Returns:
            Shape (N,), nats.
        """
        phi = _columns(self, features)
        # Not a matrix product, which autocast would compute in low precision.
        return (phi * phi.new_tensor(self.lambdas)).sum(dim=-1)


@dataclass(frozen=True)
class ExponentialReward(NumericFields):
    """``p ∝ π_ref exp(r/β)``: the optimum of ``E[r] - β KL(π‖π_ref)``; any divergence may be used to approach it.

    Attributes:
        beta: β, nats of reward; positive.

    Raises:
        ValueError: β is not positive.

    Source:
        Korbak et al. (arXiv:2205.11275), Eq. 3; Go et al., f-DPG (arXiv:2302.08215), Section 2.

    Example:
        >>> ExponentialReward(beta=0.5).log_score(torch.tensor([[1.0], [-1.0]]))
        tensor([ 2., -2.])
    """

    beta: float
    has_zeros = False
    num_features = 1

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta!r} must be positive and finite.")

    def log_score(self, features: Shaped[Tensor, "N 1"]) -> Float[Tensor, " N"]:
        """Return ``r/β``.

        Args:
            features: The reward r, shape (N, 1).

        Returns:
            Shape (N,), nats.
        """
        return _columns(self, features)[:, 0] / self.beta


@dataclass(frozen=True)
class ProductTarget:
    """``p ∝ π_ref exp(Σ_i score_i)``: several targets at once; each reads its own columns of the features, in order.

    Attributes:
        targets: The factors, one or more.

    Raises:
        ValueError: There is no factor.

    Source:
        Khalifa et al., GDC (arXiv:2012.11635), pointwise and distributional constraints together.

    Example:
        >>> target = ProductTarget((BinaryConstraint(), ExponentialReward(0.5)))
        >>> target.log_score(torch.tensor([[1.0, 3.0], [0.0, 3.0]]))
        tensor([6., -inf])
    """

    targets: tuple[Target, ...]

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("targets=() has no factor: give one target or more.")

    @property
    def has_zeros(self) -> bool:
        """True if any factor has zeros."""
        return any(target.has_zeros for target in self.targets)

    @property
    def num_features(self) -> int:
        """Number of features of all factors together."""
        return sum(target.num_features for target in self.targets)

    def log_score(self, features: Shaped[Tensor, "N K"]) -> Float[Tensor, " N"]:
        """Return the sum of the factors' scores.

        Args:
            features: The factors' features side by side, shape (N, K).

        Returns:
            Shape (N,), nats; -inf if any factor is 0.
        """
        parts = _columns(self, features).split([target.num_features for target in self.targets], dim=-1)
        scores = [target.log_score(part) for target, part in zip(self.targets, parts, strict=True)]
        return torch.stack(scores).sum(dim=0)


def _columns(target: Target, features: Tensor) -> Tensor:
    if features.shape[-1] != target.num_features:
        raise ValueError(
            f"features has shape {tuple(features.shape)}; {type(target).__name__} reads {target.num_features} of each "
            "completion."
        )
    return numbers(features, "features")
