"""The α family between the two Kullback-Leibler directions, and the squared Hellinger distance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from falign.divergences.base import Divergence
from falign.divergences.powers import alpha_generator, powerm1, tsallis_log
from falign.numeric_fields import NumericFields

__all__ = ["Alpha", "SquaredHellinger"]


@dataclass(frozen=True)
class Alpha(NumericFields, Divergence):
    """``f(u) = (u^{1-α} - (1-α) u - α)/(α(α-1))``, ``f'(u) = (1 - u^{-α})/α``.

    α → 0 is the reverse KL, α → 1 the forward KL (both are accepted), α = 1/2 twice the squared Hellinger distance,
    α = -1 half the Pearson χ². There is a barrier for α ≥ 0.

    Attributes:
        alpha: The α of the f-DPO paper. TRL's coefficient is ``1 - α``.

    Source:
        Wang et al., f-DPO (arXiv:2309.16240), Table 1; Cichocki and Amari 2010.
    """

    alpha: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be a finite number, got {self.alpha!r}.")
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "name", f"alpha({self.alpha!r})")
        object.__setattr__(self, "f_prime_at_zero", -math.inf if self.alpha >= 0 else 1 / self.alpha)
        object.__setattr__(self, "f_prime_at_infinity", 1 / self.alpha if self.alpha > 0 else math.inf)
        object.__setattr__(self, "second_derivative_at_one", 1.0)

    @override
    def dual(self) -> Divergence:
        return Alpha(1 - self.alpha)

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return alpha_generator(log_u, self.alpha)

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return tsallis_log(log_u, self.alpha)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        return y if self.alpha == 0.0 else -torch.log1p(-self.alpha * y) / self.alpha

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        return tsallis_log(log_u, self.alpha - 1)  # (u^{1-α} - 1)/(1-α)


@dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """``f(u) = (√u - 1)²``, ``f'(u) = 1 - u^{-1/2}``.

    Source:
        Hellinger 1909; half of ``alpha(0.5)``.
    """

    name = "squared_hellinger"
    f_prime_at_zero = -math.inf
    f_prime_at_infinity = 1.0
    second_derivative_at_one = 0.5

    @override
    def dual(self) -> Divergence:
        return self

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return powerm1(log_u, 0.5).square()

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return -powerm1(log_u, -0.5)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        return -2 * torch.log1p(-y)

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        return powerm1(log_u, 0.5)  # y/(1 - y)
