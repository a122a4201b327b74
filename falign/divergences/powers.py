"""Powers and logarithms of the density ratio u that stay finite where ``exp`` does not.

Everything takes ``log_u`` and works for any shape. Up to ``|log u| = 30`` the values are those of the formula. Beyond,
a *growing* exponential continues as its tangent line: it stays finite and, unlike a clamp, keeps its gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["alpha_generator", "log_mixture", "power", "powerm1", "solve_expm1_plus_identity", "tsallis_log"]

LINEAR_BEYOND = 30.0
# In single precision e^60 leaves room for the factors |log u| ≤ 1e4 and another power of u below 3.4e38.
LARGEST_EXPONENT = {torch.float64: 600.0, torch.float32: 60.0}
# Last power of log u in the series up to |log u| = 1.5. The first one that is left out is smaller than the rounding
# error relative to (log u)²/2, also with coefficients that grow as its index: 42 · 1.5^21/23! and 26 · 1.5^12/14!.
SERIES_POWERS = {torch.float64: 22, torch.float32: 13}


def power(log_u: Float[Tensor, "*S"], exponent: float = 1.0) -> Float[Tensor, "*S"]:
    """Return ``u^c``, linear in ``log u`` beyond 30 nats on the growing side.

    Args:
        log_u: ``log u``, any shape, nats, float32 or float64.
        exponent: ``c``.

    Returns:
        ``exp(c log u)`` while ``c log u ≤ min(30 |c|, 60)`` (600 in place of 60 in float64), then its tangent line.

    Example:
        >>> power(torch.tensor([0.0, 1000.0]), 1.0)
        tensor([1.0000e+00, 1.0377e+16])
    """
    inside, beyond = _exponent(log_u, exponent)
    return torch.exp(inside) * (1 + beyond)


def powerm1(log_u: Float[Tensor, "*S"], exponent: float = 1.0) -> Float[Tensor, "*S"]:
    """Return ``u^c - 1``, without cancellation near u = 1 and linear in ``log u`` beyond 30 nats where it grows.

    Args:
        log_u: ``log u``, any shape, nats, float32 or float64.
        exponent: ``c``.

    Returns:
        ``expm1(c log u)``, continued as :func:`power` is.

    Example:
        >>> powerm1(torch.tensor([0.0, 1e-6]), 2.0)
        tensor([0.0000e+00, 2.0000e-06])
    """
    inside, beyond = _exponent(log_u, exponent)
    return _Expm1.apply(inside) + torch.exp(inside) * beyond


def _exponent(log_u: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """``factor · log_u`` in two parts: the argument of the exponential, and a rest for its tangent line.

    The rest is what lies beyond the turning point and, in float32, the rounding error of the product: left out, an
    exponent of 30 would cost 2e-6 of the exponential.
    """
    product = log_u * factor
    # exp(product) follows the formula up to `turn`; `power` multiplies by 1 + beyond, its tangent line from there on.
    turn = min(LINEAR_BEYOND * abs(factor), LARGEST_EXPONENT[log_u.dtype])
    inside, beyond = torch.clamp(product, max=turn), torch.relu(product - turn)
    if log_u.dtype == torch.float64 or math.frexp(factor)[0] in (0.5, -0.5):  # a power of two scales exactly
        return inside, beyond
    error = (log_u.detach().double() * factor - product.detach().double()).to(log_u.dtype)
    return inside, beyond + torch.where(torch.isfinite(error), error, torch.zeros_like(error))


def log_mixture(log_u: Float[Tensor, "*S"], weight: float, rest: float) -> Float[Tensor, "*S"]:
    """Return ``log(w u + c)``, ``c = 1 - w``: the density of the mixture ``w π + c π_ref`` over ``π_ref``.

    Args:
        log_u: ``log u``, any shape, nats.
        weight: ``w``, in (0, 1).
        rest: ``c``; a separate argument, because ``1 - w`` would lose digits if c is small.

    Returns:
        The logarithm, exact to rounding near u = 1 and for any size of ``log u``.

    Example:
        >>> log_mixture(torch.tensor([0.0, 1000.0]), 0.5, 0.5)
        tensor([  0.0000, 999.3068])
    """
    if 0.05 <= weight <= 0.5:
        # Nothing cancels, because w(u - 1) > -1/2. Beyond 40 nats c is less than the rounding error of w u, for w that
        # are not tiny. Below, the square of w u is finite, which a second derivative needs.
        near = torch.log1p(weight * _Expm1.apply(torch.clamp(log_u, max=40.0)))
        return torch.where(log_u <= 40.0, near, log_u + math.log(weight))
    inside = torch.clamp(log_u, -LINEAR_BEYOND, LINEAR_BEYOND)
    change = weight * _Expm1.apply(inside)
    # Near u = 1 log1p has no cancellation; toward w u + c = 0 it has. Its argument is clamped where it is not used,
    # because torch.where would multiply an infinite derivative by 0.
    near = torch.log1p(torch.clamp(change, min=-0.5))
    low = torch.log(rest + weight * torch.exp(inside))
    # log(e^a + e^b); torch.logaddexp has a second derivative of inf/inf if a and b are far apart.
    ahead = log_u + (math.log(weight) - math.log(rest))
    far = torch.where(ahead > 0, log_u + math.log(weight) - F.logsigmoid(ahead), math.log(rest) - F.logsigmoid(-ahead))
    return torch.where(log_u.abs() <= LINEAR_BEYOND, torch.where(change < -0.5, low, near), far)


def tsallis_log(log_u: Float[Tensor, "*S"], alpha: float) -> Float[Tensor, "*S"]:
    """Return ``(1 - u^{-α})/α``, the α-logarithm, which is ``log u`` at α = 0: f' of the α family.

    Args:
        log_u: ``log u``, any shape, nats.
        alpha: α, any real number.

    Returns:
        The α-logarithm; zero at u = 1, increasing.

    Example:
        >>> tsallis_log(torch.tensor([1.0, 1.0]), 0.0)
        tensor([1., 1.])
    """
    if alpha == 0.0:
        return log_u
    return powerm1(log_u, -alpha) / -alpha


def alpha_generator(log_u: Float[Tensor, "*S"], alpha: float) -> Float[Tensor, "*S"]:
    """Return ``f_α(u) = ∫_1^u (1 - t^{-α})/α dt``, without cancellation for any α and any u.

    α = 0 is ``u log u - u + 1``, α = 1 is ``u - 1 - log u``.

    Args:
        log_u: ``log u``, any shape, nats.
        alpha: α, any real number.

    Returns:
        The generator, zero at u = 1 and positive elsewhere.

    Source:
        Near u = 1 the power series ``Σ_{k≥2} c_k (log u)^k / k!`` with ``c_2 = 1``, ``c_{k+1} = 1 + (1-α) c_k``; its
        terms do not cancel. Elsewhere ``(u (L_α(u) - 1) + 1)/(1-α)`` or ``(u - 1 - L_{α-1}(u))/α``, ``L`` the
        α-logarithm; each is used on the side where its denominator is at least 1/2.

    Example:
        >>> alpha_generator(torch.tensor([1e-4]), 0.0)
        tensor([5.0003e-09])
    """
    # The terms of the series grow like ((1-α) log u)^k / k!, so its radius shrinks with |1 - α|.
    radius = 1.5 / max(1.0, abs(1 - alpha))
    near = _AlphaSeries.apply(torch.clamp(log_u, -radius, radius), alpha)
    if abs(alpha) < 0.5:
        far = (power(log_u) * (tsallis_log(log_u, alpha) - 1) + 1) / (1 - alpha)
    else:
        far = (powerm1(log_u) - tsallis_log(log_u, alpha - 1)) / alpha
    return torch.where(log_u.abs() <= radius, near, far)


class _Expm1(torch.autograd.Function):
    """``e^x - 1`` with the derivative ``e^x``; torch's is ``(e^x - 1) + 1``, which is 0 long before ``e^x`` is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.expm1(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * torch.exp(x)

    jvp = backward  # elementwise: forward and backward mode multiply by the same derivative


class _AlphaSeries(torch.autograd.Function):
    """The power series of ``f_α`` in ``log u``; d f/d log u = u f'(u), so nothing but ``log u`` is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(log_u: Tensor, alpha: float) -> Tensor:
        last = SERIES_POWERS[log_u.dtype]
        coefficients = [1.0]
        for _ in range(last - 2):
            coefficients.append(1 + (1 - alpha) * coefficients[-1])
        # Horner's scheme in place: Σ_k c_k (log u)^k / k!, k from 2.
        total = torch.full_like(log_u, coefficients[-1] / math.factorial(last))
        for k in range(last - 1, 1, -1):
            total.mul_(log_u).add_(coefficients[k - 2] / math.factorial(k))
        return total.mul_(log_u).mul_(log_u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        log_u, ctx.alpha = inputs
        ctx.save_for_backward(log_u)
        ctx.save_for_forward(log_u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (log_u,) = ctx.saved_tensors
        return grads[0] * power(log_u) * tsallis_log(log_u, ctx.alpha), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _AlphaSeries.backward(ctx, tangents[0])[0]


def solve_expm1_plus_identity(y: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Return x with ``e^x - 1 + x = y``, by Newton's method (the Wright omega function, shifted).

    Args:
        y: Right-hand side, any shape.

    Returns:
        The solution, exact to rounding near 0 too; it has no gradient.

    Example:
        >>> solve_expm1_plus_identity(torch.tensor([0.0, math.e]))
        tensor([0., 1.])
    """
    y = y.detach()
    # The left side is convex and increasing, so from a point right of the root Newton's steps descend onto it.
    x = torch.where(y > 0, torch.log1p(torch.clamp(y, min=0.0)), y + 1)
    for _ in range(20):
        growth = torch.expm1(x)
        x = x - (growth + x - y) / (growth + 2)
    return torch.where(torch.isinf(y), y, x)
