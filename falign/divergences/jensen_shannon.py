"""Divergences from the mixture of policy and reference; they are bounded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from falign.divergences.base import Divergence
from falign.divergences.powers import alpha_generator, log_mixture, power
from falign.numeric_fields import NumericFields

__all__ = ["GeneralizedJS", "JensenShannon"]


@dataclass(frozen=True)
class GeneralizedJS(NumericFields, Divergence):
    """``b KL(π‖m) + (1-b) KL(π_ref‖m)`` with ``m = b π + (1-b) π_ref``.

    ``f(u) = b u log(u/(b u + 1 - b)) - (1-b) log(b u + 1 - b)``, ``f'(u) = b log(u/(b u + 1 - b))``. b = 1/2 is the
    Jensen-Shannon divergence itself (half of ``jensen_shannon``).

    Attributes:
        b: Weight of the policy in the mixture, in (0, 1).
        rest: ``1 - b``; the dual of a tiny b passes it on, because the difference would lose digits.

    Source:
        Lin 1991 (skewed Jensen-Shannon); the distillation loss of Agarwal et al., GKD (arXiv:2306.13649).
    """

    b: float
    rest: float = field(default=math.nan, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0.0 < 1 - self.b < 1.0:  # also refuses a b below 1e-16, for which 1 - b rounds to 1
            raise ValueError(f"generalized_js needs 0 < b < 1, got b={self.b!r}; at the ends it is 0 everywhere.")
        object.__setattr__(self, "b", float(self.b))
        object.__setattr__(self, "rest", 1 - self.b if math.isnan(self.rest) else self.rest)
        object.__setattr__(self, "name", f"generalized_js({self.b!r})")
        object.__setattr__(self, "f_prime_at_zero", -math.inf)
        object.__setattr__(self, "f_prime_at_infinity", -self.b * math.log(self.b))
        object.__setattr__(self, "second_derivative_at_one", self.b * self.rest)

    @override
    def dual(self) -> Divergence:
        return GeneralizedJS(self.rest, self.b)

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        # b m φ(u/m) + (1-b) m φ(1/m) with φ(t) = t log t - t + 1: two terms that are never negative.
        u = power(log_u)
        mixture = self.b * u + self.rest
        of_policy = _excess(u, mixture, self._log_u_over_mixture(log_u))
        of_reference = _excess(torch.ones_like(u), mixture, -log_mixture(log_u, self.b, self.rest))
        return self.b * of_policy + self.rest * of_reference

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return self.b * self._log_u_over_mixture(log_u)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        z = y / self.b
        return z - torch.log1p(-self.b / self.rest * torch.expm1(z))

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        return self.rest * log_mixture(log_u, self.b, self.rest)

    def _log_u_over_mixture(self, log_u: Tensor) -> Tensor:
        """``log(u/(b u + 1 - b)) = -log((1-b)/u + b)``."""
        return -log_mixture(-log_u, self.rest, self.b)


def _excess(t: Tensor, m: Tensor, log_ratio: Tensor) -> Tensor:
    """``m φ(t/m) = t log(t/m) - t + m``, by the series where the terms cancel; ``log_ratio`` is ``log(t/m)``."""
    near = m * alpha_generator(torch.clamp(log_ratio, -1.5, 1.5), 0.0)
    return torch.where(log_ratio.abs() <= 1.5, near, t * (log_ratio - 1) + m)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """Twice the Jensen-Shannon divergence: ``f(u) = u log u - (u+1) log((u+1)/2)``, ``f'(u) = log(2u/(1+u))``.

    Source:
        Wang et al., f-DPO (arXiv:2309.16240), Table 1, with its scale.
    """

    name = "jensen_shannon"
    f_prime_at_zero = -math.inf
    f_prime_at_infinity = math.log(2.0)
    second_derivative_at_one = 0.5

    @override
    def dual(self) -> Divergence:
        return self

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return 2 * GeneralizedJS(0.5)._f(log_u)

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return 2 * GeneralizedJS(0.5)._f_prime(log_u)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        return GeneralizedJS(0.5)._f_prime_inverse(y / 2)

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        return 2 * GeneralizedJS(0.5)._conjugate_at(log_u, y / 2)
