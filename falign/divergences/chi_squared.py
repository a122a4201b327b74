"""The χ² divergences, and the mixture of χ² and KL that gives χ² a barrier."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from falign.divergences.base import Divergence
from falign.divergences.powers import alpha_generator, powerm1, solve_expm1_plus_identity

__all__ = ["Chi2KL", "Chi2KLDual", "NeymanChi2", "PearsonChi2"]


@dataclass(frozen=True)
class PearsonChi2(Divergence):
    """``χ²(π‖π_ref)``: ``f(u) = (u-1)²``, ``f'(u) = 2(u-1)``. No barrier: f-DPO refuses it.

    Source:
        Pearson 1900; Wang et al., f-DPO (arXiv:2309.16240), Table 1.
    """

    name = "pearson_chi2"
    f_prime_at_zero = -2.0
    f_prime_at_infinity = math.inf
    second_derivative_at_one = 2.0

    @override
    def dual(self) -> Divergence:
        return NeymanChi2()

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return powerm1(log_u).square()

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return 2 * powerm1(log_u)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        return torch.log1p(y / 2)

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        return powerm1(log_u, 2.0)  # y + y²/4


@dataclass(frozen=True)
class NeymanChi2(Divergence):
    """``χ²(π_ref‖π)``: ``f(u) = (1-u)²/u``, ``f'(u) = 1 - u^{-2}``.

    Source:
        Neyman 1949; the dual of ``pearson_chi2``.
    """

    name = "neyman_chi2"
    f_prime_at_zero = -math.inf
    f_prime_at_infinity = 1.0
    second_derivative_at_one = 2.0

    @override
    def dual(self) -> Divergence:
        return PearsonChi2()

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return -powerm1(log_u) * powerm1(log_u, -1.0)  # (u - 1)(1 - 1/u)

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return -powerm1(log_u, -2.0)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        return -torch.log1p(-y) / 2

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        return -2 * powerm1(log_u, -1.0)  # 2 - 2√(1-y)


@dataclass(frozen=True)
class Chi2KL(Divergence):
    """Half of ``χ²(π‖π_ref)`` plus ``KL(π‖π_ref)``: ``f'(u) = u - 1 + log u``. The regularizer of χPO.

    Source:
        Huang et al., χPO (arXiv:2407.13399), with link ``u + log u``.
    """

    name = "chi2_kl"
    f_prime_at_zero = -math.inf
    f_prime_at_infinity = math.inf
    second_derivative_at_one = 2.0

    @override
    def dual(self) -> Divergence:
        return Chi2KLDual()

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return powerm1(log_u).square() / 2 + alpha_generator(log_u, 0.0)

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return powerm1(log_u) + log_u

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        return solve_expm1_plus_identity(y)

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        growth = powerm1(log_u)
        return growth * (growth + 4) / 2  # (u - 1)(u + 3)/2


@dataclass(frozen=True)
class Chi2KLDual(Divergence):
    """Half of ``χ²(π_ref‖π)`` plus ``KL(π_ref‖π)``: ``f'(u) = (1 - u^{-2})/2 + 1 - 1/u``.

    Source:
        The dual of ``chi2_kl``.
    """

    name = "dual(chi2_kl)"
    f_prime_at_zero = -math.inf
    f_prime_at_infinity = 1.5
    second_derivative_at_one = 2.0

    @override
    def dual(self) -> Divergence:
        return Chi2KL()

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return NeymanChi2()._f(log_u) / 2 + alpha_generator(log_u, 1.0)

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return -powerm1(log_u, -2.0) / 2 - powerm1(log_u, -1.0)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        # 1/u - 1 = √(4 - 2y) - 2, written without the difference.
        return -torch.log1p(-2 * y / (torch.sqrt(4 - 2 * y) + 2))

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        return log_u - powerm1(log_u, -1.0)
