"""A divergence from a user's own generator f(u)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from falign.divergences.base import Divergence
from falign.divergences.powers import LINEAR_BEYOND

__all__ = ["GeneratorDivergence", "from_generator"]

Generator = Callable[[Tensor], Tensor]
BISECTIONS = 80


def from_generator(
    f: Generator,
    *,
    name: str,
    f_prime_at_zero: float | None = None,
    f_prime_at_infinity: float | None = None,
) -> Divergence:
    """Return the divergence of any convex generator, with f' by autograd and its inverse by bisection.

    Args:
        f: ``f(u)`` as a torch function of ``u > 0``, elementwise, differentiable, convex. It need not be in normal
            form: ``f(1)`` and ``f'(1) (u - 1)`` are subtracted. It is called in float64.
        name: What messages and metrics call it.
        f_prime_at_zero: ``f'(0+)`` of the normal form; measured when not given.
        f_prime_at_infinity: ``f'(∞)`` of the normal form; measured when not given.

    Returns:
        A divergence with everything that the built-in ones have. Beyond ``|log u| = 30`` f and f' continue as their
        tangent lines in ``log u``.

    Raises:
        ValueError: f is not finite or not convex somewhere in ``|log u| ≤ 30``, or is affine, or the limits of f'
            cannot be measured.

    Source:
        Csiszár 1967.

    Example:
        >>> mine = from_generator(lambda u: u * torch.log(u), name="mine")
        >>> mine.f_prime(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-1.,  0.,  2.])
    """
    grid = torch.linspace(-LINEAR_BEYOND, LINEAR_BEYOND, 241, dtype=torch.float64)
    value, slope = _value_and_slope(f, grid.exp())
    if not (torch.isfinite(value).all() and torch.isfinite(slope).all()):
        where = grid[~(torch.isfinite(value) & torch.isfinite(slope))][0].exp().item()
        raise ValueError(f"The generator {name!r} is not finite at u = {where:.3g}; f and f' must be finite for u > 0.")
    fall = slope.diff() < -1e-9 * (1 + slope[1:].abs())
    if fall.any():
        where = grid[1:][fall][0].exp().item()
        raise ValueError(f"The generator {name!r} is not convex: f' falls near u = {where:.3g}.")
    if (slope - slope[0]).abs().max() <= 1e-12 * slope.abs().max():
        raise ValueError(
            f"The generator {name!r} is affine (f'' = 0): its divergence is 0 between any two distributions; give an f "
            "that is curved somewhere."
        )
    at_one, slope_at_one = (x.item() for x in _value_and_slope(f, torch.ones((), dtype=torch.float64)))

    def limit(sign: int, argument: str) -> float:
        return _limit(f, sign, slope_at_one, name=name, argument=argument)

    return GeneratorDivergence(
        generator=f,
        name=name,
        value_at_one=at_one,
        slope_at_one=slope_at_one,
        f_prime_at_zero=limit(-1, "f_prime_at_zero") if f_prime_at_zero is None else f_prime_at_zero,
        f_prime_at_infinity=limit(1, "f_prime_at_infinity") if f_prime_at_infinity is None else f_prime_at_infinity,
        second_derivative_at_one=_second_derivative_at_one(f),
    )


@dataclass(frozen=True)
class GeneratorDivergence(Divergence):
    """What :func:`from_generator` returns: ``f(u) - f(1) - f'(1)(u - 1)`` of a user's own f.

    It is equal to another one with the same function object.

    Source:
        See :func:`from_generator`.
    """

    generator: Generator
    name: str
    value_at_one: float
    slope_at_one: float
    f_prime_at_zero: float
    f_prime_at_infinity: float
    second_derivative_at_one: float
    swapped: Divergence | None = field(default=None, compare=False, repr=False)

    @override
    def dual(self) -> Divergence:
        if self.swapped is None:
            f = self.generator
            dual = from_generator(lambda u: u * f(1 / u), name=f"dual({self.name})")
            object.__setattr__(dual, "swapped", self)
            object.__setattr__(self, "swapped", dual)
        assert self.swapped is not None
        return self.swapped

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return self._continued(log_u, lambda u: self.generator(u) - self.value_at_one - self.slope_at_one * (u - 1))

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return self._continued(log_u, lambda u: _slope(self.generator, u) - self.slope_at_one)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        low, high = torch.full_like(y, -1e4), torch.full_like(y, 1e4)
        with torch.no_grad():
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                below = self._f_prime(middle) < y
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        inside = torch.clamp(log_u, -LINEAR_BEYOND, LINEAR_BEYOND)
        return inside.exp() * y - self._f(inside)

    @staticmethod
    def _continued(log_u: Tensor, function: Generator) -> Tensor:
        """``function(u)`` in float64, as its tangent line in ``log u`` beyond 30 nats."""
        x = log_u.double()
        inside = torch.clamp(x, -LINEAR_BEYOND, LINEAR_BEYOND)
        edges = torch.tensor([-LINEAR_BEYOND, LINEAR_BEYOND], dtype=torch.float64, device=x.device)
        slope_low, slope_high = _slope(lambda edge: function(edge.exp()), edges)
        tails = slope_low * -torch.relu(inside - x) + slope_high * torch.relu(x - inside)
        return (function(inside.exp()) + tails).to(log_u.dtype)


def _slope(f: Generator, u: Tensor) -> Tensor:
    """``f'(u)`` of an elementwise f, differentiable once more where u asks for it."""
    with torch.enable_grad():
        at = u if u.requires_grad else u.detach().requires_grad_()
        (slope,) = torch.autograd.grad(f(at).sum(), at, create_graph=u.requires_grad)
    return slope


def _value_and_slope(f: Generator, u: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        value = f(u)
    if value.shape != u.shape:
        raise ValueError(f"A generator is elementwise: for u of shape {tuple(u.shape)} it gave {tuple(value.shape)}.")
    return value, _slope(f, u)


def _second_derivative_at_one(f: Generator) -> float:
    """``f''(1)`` by central differences of f' at two widths; NaN where they disagree, which is a kink."""
    widths = torch.tensor([1e-5, 1e-6], dtype=torch.float64)
    wide, narrow = ((_slope(f, 1 + widths) - _slope(f, 1 - widths)) / (2 * widths)).tolist()
    return wide if abs(wide - narrow) <= 0.01 * abs(wide) else math.nan


def _limit(f: Generator, sign: int, slope_at_one: float, *, name: str, argument: str) -> float:
    """Return the limit of f': bounded if doubling ``log u`` hardly moves it, infinite if it keeps moving."""
    log_u = sign * torch.tensor([75.0, 150.0, 300.0], dtype=torch.float64)
    near, middle, far = _slope(f, log_u.exp()).tolist()
    if not all(map(math.isfinite, (near, middle, far))):
        return sign * math.inf
    first, second = abs(middle - near), abs(far - middle)
    if second <= 1e-9 * (1 + abs(far)):
        return far - slope_at_one
    if second >= 1.5 * first:  # a logarithm doubles its step with its argument, a power grows faster
        return sign * math.inf
    raise ValueError(f"Whether f' of {name!r} stays bounded cannot be measured; pass {argument}= to from_generator.")
