"""The Kullback-Leibler divergence in both directions, and their sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from falign.divergences.base import Divergence
from falign.divergences.powers import alpha_generator, powerm1, solve_expm1_plus_identity

__all__ = ["ForwardKL", "Jeffreys", "ReverseKL"]


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """``KL(π‖π_ref)``: ``f(u) = u log u - u + 1``, ``f'(u) = log u``. The divergence of DPO, PPO and GRPO.

    Source:
        Rafailov et al., DPO (arXiv:2305.18290); Wang et al., f-DPO (arXiv:2309.16240), Table 1.
    """

    name = "reverse_kl"
    f_prime_at_zero = -math.inf
    f_prime_at_infinity = math.inf
    second_derivative_at_one = 1.0

    @override
    def dual(self) -> Divergence:
        return ForwardKL()

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return alpha_generator(log_u, 0.0)

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return log_u

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        return y

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        return powerm1(log_u)  # e^y - 1


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """``KL(π_ref‖π)``: ``f(u) = -log u + u - 1``, ``f'(u) = 1 - 1/u``.

    Source:
        Wang et al., f-DPO (arXiv:2309.16240), Table 1, where f' is ``-1/u``.
    """

    name = "forward_kl"
    f_prime_at_zero = -math.inf
    f_prime_at_infinity = 1.0
    second_derivative_at_one = 1.0

    @override
    def dual(self) -> Divergence:
        return ReverseKL()

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return alpha_generator(log_u, 1.0)

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return -powerm1(log_u, -1.0)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        return -torch.log1p(-y)

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        return log_u  # -log(1 - y)


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """``KL(π‖π_ref) + KL(π_ref‖π)``: ``f(u) = (u - 1) log u``, ``f'(u) = log u + 1 - 1/u``.

    Source:
        Jeffreys 1946. Both tails hold: a mode that is dropped costs as much as one that is invented.
    """

    name = "jeffreys"
    f_prime_at_zero = -math.inf
    f_prime_at_infinity = math.inf
    second_derivative_at_one = 2.0

    @override
    def dual(self) -> Divergence:
        return self

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return powerm1(log_u) * log_u

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return log_u - powerm1(log_u, -1.0)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        return -solve_expm1_plus_identity(-y)

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        return log_u + powerm1(log_u)
