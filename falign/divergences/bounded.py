"""Divergences with bounded f': total variation and Le Cam. Neither has a barrier, so f-DPO refuses them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from falign.divergences.base import Divergence
from falign.divergences.powers import powerm1

__all__ = ["LeCam", "TotalVariation"]


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """``½ Σ |π - π_ref|``: ``f(u) = ½|u-1|``, ``f'(u) = ½ sign(u-1)``, a kink at u = 1.

    There the inverse is set-valued: every y in [-½, ½] is sent to ``log u = 0``.

    Source:
        Wang et al., f-DPO (arXiv:2309.16240), Table 1.
    """

    name = "total_variation"
    f_prime_at_zero = -0.5
    f_prime_at_infinity = 0.5
    second_derivative_at_one = math.nan

    @override
    def dual(self) -> Divergence:
        return self

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return powerm1(log_u).abs() / 2

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return (torch.sign(log_u) / 2).masked_fill(log_u.isnan(), math.nan)  # torch's sign of NaN is 0

    @override
    def _inverse_or_infinity(self, y: Tensor) -> Tensor:
        return torch.where(y.abs() <= 0.5, torch.zeros_like(y), torch.sign(y) * math.inf)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        return torch.clamp(y, min=-0.5)


@dataclass(frozen=True)
class LeCam(Divergence):
    """Le Cam's distance: ``f(u) = (u-1)²/(u+1)``, ``f'(u) = (u-1)(u+3)/(u+1)²``.

    With ``t = tanh(½ log u) = (u-1)/(u+1)``: ``f = (u-1) t`` and ``f' = t (2-t)``.

    Source:
        Le Cam 1986 (the triangular discrimination).
    """

    name = "le_cam"
    f_prime_at_zero = -3.0
    f_prime_at_infinity = 1.0
    second_derivative_at_one = 1.0

    @override
    def dual(self) -> Divergence:
        return self

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return powerm1(log_u) * torch.tanh(log_u / 2)

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        t = torch.tanh(log_u / 2)
        return t * (2 - t)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        root = torch.sqrt(1 - y)
        t = y / (1 + root)  # 1 - √(1-y), so 1 - t is the root
        return torch.log1p(2 * t / root)  # log((1+t)/(1-t))

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        t = torch.tanh(log_u / 2)
        return t * (2 + t)
