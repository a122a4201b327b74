"""Divergences from a user's own generator f(u), and their duals."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from falign.divergences.base import Divergence
from falign.divergences.powers import LARGEST_EXPONENT, LINEAR_BEYOND
from falign.numeric_fields import NumericFields

__all__ = ["GeneratorDivergence", "from_generator"]

Generator = Callable[[Tensor], Tensor]
Ends = tuple[float, float]
BISECTIONS = 80
ROUNDING = torch.finfo(torch.float64).eps
GRID = torch.linspace(-LINEAR_BEYOND, LINEAR_BEYOND, 241, dtype=torch.float64)  # log u
LIMIT_SCALES = (300.0, 120.0, LINEAR_BEYOND)  # values of log u at which the limit of f' is measured


def from_generator(
    f: Generator,
    *,
    name: str,
    f_prime_at_zero: float | None = None,
    f_prime_at_infinity: float | None = None,
) -> Divergence:
    """Return the divergence of any convex generator, with f' by autograd and its inverse by bisection.

    Args:
        f: ``f(u)`` as a torch function of ``u > 0``, elementwise, differentiable, convex; it may have kinks. It need
            not be in normal form: ``f(1)`` and ``f'(1) (u - 1)`` are subtracted. It is called in float64.
        name: Its name in messages and metrics.
        f_prime_at_zero: ``f'(0+)`` of the normal form; measured when not given.
        f_prime_at_infinity: ``f'(∞)`` of the normal form; measured when not given.

    Returns:
        A divergence with the full interface of the built-in ones. Beyond ``|log u| = 30``, and where single precision
        would overflow (e^60), f and f' continue as their tangent lines in ``log u``. The dual is ``u f(1/u)`` of f
        itself, and its limits follow from f: ``f°'(∞) = f(0)``, and ``f°'(0+) = -f*(f'(∞))``.

    Raises:
        TypeError: f does not return a tensor of the dtype of u.
        ValueError: f is not elementwise, not a differentiable function of u, not finite or not convex somewhere in
            ``|log u| ≤ 30``, or affine; f' is lost in rounding; or a limit of f' cannot be measured, or is given and
            contradicts f'.

    Source:
        Csiszár 1967.

    Example:
        >>> mine = from_generator(lambda u: u * torch.log(u), name="mine")
        >>> mine.f_prime(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-1.,  0.,  2.])
    """
    _check(f, name)
    value_at_one, slope_at_one = (x.item() for x in _value_and_slope(f, torch.ones((), dtype=torch.float64)))

    def limit(sign: int, given: float | None, argument: str) -> float:
        measured, end = _measured_limit(f, sign, slope_at_one)
        if given is None and measured is None:
            raise ValueError(
                f"Whether f' of {name!r} stays bounded cannot be measured; pass {argument}= to from_generator."
            )
        if given is None or measured is None:
            limit = measured if given is None else float(given)
            assert limit is not None
        else:
            limit = float(given)
            if not math.isclose(limit, measured, rel_tol=1e-5, abs_tol=1e-8):
                raise ValueError(
                    f"{argument}={given!r} of {name!r} contradicts f', whose limit in normal form (f'(1) = 0) is "
                    f"{measured:.6g}; leave it out."
                )
        if math.isnan(limit) or sign * (limit - end) < -1e-6 * (1 + abs(end)):
            raise ValueError(
                f"{argument}={limit!r} of {name!r} contradicts f', which is {end:.6g} in normal form (f'(1) = 0) on "
                "that side and never falls."
            )
        return limit

    return GeneratorDivergence(
        generator=f,
        name=name,
        value_at_one=value_at_one,
        slope_at_one=slope_at_one,
        f_prime_at_zero=limit(-1, f_prime_at_zero, "f_prime_at_zero"),
        f_prime_at_infinity=limit(1, f_prime_at_infinity, "f_prime_at_infinity"),
        second_derivative_at_one=_second_derivative_at_one(f),
    )


class _Continued(Divergence):
    """A divergence in float64. Far out, f and f' continue as their tangent lines in ``log u``."""

    @abstractmethod
    def _value(self, log_u: Tensor) -> Tensor:
        """``f(u)``, float64, differentiable."""

    @abstractmethod
    def _slope(self, log_u: Tensor) -> Tensor:
        """``f'(u)``, float64, differentiable."""

    @abstractmethod
    def _rate(self, log_u: Tensor) -> Tensor:
        """``u f''(u)``, the derivative of f' in ``log u``, float64, differentiable."""

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        ends = self._reaches[log_u.dtype]
        return self._continued(log_u, self._value, ends, self._tangents(ends)[0])

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        low, high = self._reaches[log_u.dtype]
        ends = (max(low, self._slope_from), high)
        value = self._continued(log_u, self._slope, ends, self._tangents(ends)[1])
        return torch.clamp(value, self.f_prime_at_zero, self.f_prime_at_infinity)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        # f' is non-decreasing, so bisection works for any generator; 80 halvings of 2e4 reach float64 resolution.
        low, high = torch.full_like(y, -1e4), torch.full_like(y, 1e4)
        with torch.no_grad():
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                below = self._f_prime(middle) < y
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(y.isnan(), y, (low + high) / 2)

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        inside = torch.clamp(log_u, *self._reaches[y.dtype])
        return inside.exp() * y - self._f(inside)

    def _continued(self, log_u: Tensor, function: Generator, ends: Ends, tangents: Ends) -> Tensor:
        # Beyond the ends `inside` is constant, and the relu terms give the tangent line and its gradient.
        x = log_u.double()
        inside = torch.clamp(x, *ends)
        slope_low, slope_high = tangents
        tails = slope_low * -torch.relu(inside - x) + slope_high * torch.relu(x - inside)
        return (function(inside) + tails).to(log_u.dtype)

    @cached_property
    def _slope_from(self) -> float:
        """The ``log u`` below which rounding error dominates the formula of f'."""
        return -math.inf

    @cached_property
    def _reaches(self) -> dict[torch.dtype, Ends]:
        """The range of ``log u`` in which the formulas are used: 30 nats, less if f or a derivative would overflow."""
        # The range is cut where f, f' or u f'' exceeds e^60 in single precision (e^600 in double precision).
        size = torch.stack([self._value(GRID), self._slope(GRID), self._rate(GRID)]).abs().amax(dim=0)
        found = {}
        for dtype, exponent in LARGEST_EXPONENT.items():
            kept = GRID[size <= math.exp(exponent)]
            found[dtype] = (kept.min().item(), kept.max().item())
        return found

    @cached_property
    def _known_tangents(self) -> dict[Ends, tuple[Ends, Ends]]:
        return {}

    def _tangents(self, ends: Ends) -> tuple[Ends, Ends]:
        """The derivatives in ``log u`` of f and of f', each at both ends."""
        if ends not in self._known_tangents:
            x = torch.tensor(ends, dtype=torch.float64)
            of_f, of_f_prime = (x.exp() * self._slope(x)).tolist(), torch.relu(self._rate(x)).tolist()
            self._known_tangents[ends] = ((of_f[0], of_f[1]), (of_f_prime[0], of_f_prime[1]))
        return self._known_tangents[ends]


@dataclass(frozen=True)
class GeneratorDivergence(NumericFields, _Continued):
    """``f(u) - f(1) - f'(1)(u - 1)`` of a user's own f, from :func:`from_generator`.

    Two divergences of the same function object are equal.

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

    @override
    def dual(self) -> Divergence:
        return self._dual

    @cached_property
    def _dual(self) -> GeneratorDual:
        return GeneratorDual(self)

    @override
    def _value(self, log_u: Tensor) -> Tensor:
        return self.generator(log_u.exp()) - self.value_at_one - self.slope_at_one * torch.expm1(log_u)

    @override
    def _slope(self, log_u: Tensor) -> Tensor:
        return _slope(self.generator, log_u.exp()) - self.slope_at_one

    @override
    def _rate(self, log_u: Tensor) -> Tensor:
        u = log_u.exp()
        return u * _slope(lambda v: _slope(self.generator, v), u)

    def limit_at_zero(self) -> float:
        """Return ``f(0)``, which may be infinite.

        ``f(u) + ∫ (-t f'(t)) d log t``: if ``-u f'(u)`` does not fall toward u = 0, the integral diverges.
        """
        x = torch.tensor([-20.0, -28.0], dtype=torch.float64)
        value, growth = self._value(x)[1].item(), (-x.exp() * self._slope(x)).tolist()
        return _limit_of_tail(value, growth, step=8.0, negligible=1e-12 * (1 + abs(value)), tolerance=1e-6)

    def conjugate_of_slope_at(self, u: Tensor) -> Tensor:
        """Return ``f*(f'(u)) = u f'(u) - f(u)``."""
        return u * _slope(self.generator, u) - self.generator(u) + self.value_at_one - self.slope_at_one

    def conjugate_of_slope(self, log_u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``f*(f'(u)) = u f'(u) - f(u)``, its growth per nat, ``u² f''(u)``, and its rounding error.

        Far out it is a small difference of two large numbers, so its rounding error matters.
        """
        u = log_u.exp()
        with torch.no_grad():
            rounding = _rounding(self.conjugate_of_slope_at, u) + ROUNDING * u * (
                _slope(self.generator, u).abs() + abs(self.slope_at_one)
            )
            return self.conjugate_of_slope_at(u), u * self._rate(log_u), rounding

    def conjugate_at_the_end(self) -> float:
        """Return ``f*(f'(∞)) = lim u f'(u) - f(u)``, which may be infinite.

        It is followed only as far as its growth clearly exceeds its rounding error.
        """
        if self.f_prime_at_infinity == math.inf:
            return math.inf
        x = torch.tensor([4.0, 8.0, 12.0, 16.0, 20.0, 24.0], dtype=torch.float64)
        value, growth, rounding = self.conjugate_of_slope(x)
        # cumprod: count the leading points with clear growth, up to the first without.
        clear = int((growth > 1e4 * rounding).long().cumprod(dim=0).sum())
        if clear < 2:
            return value[clear].item()
        last = slice(clear - 2, clear)
        return _limit_of_tail(value[clear - 1].item(), growth[last].tolist(), step=4.0, negligible=0.0, tolerance=3e-5)


@dataclass(frozen=True)
class GeneratorDual(_Continued):
    """``f°(u) = u f(1/u)`` of a user's own f, by f itself: ``f°' = f(v) - v f'(v)`` with ``v = 1/u``.

    Source:
        See :func:`from_generator`.
    """

    primal: GeneratorDivergence

    def __post_init__(self) -> None:
        primal = self.primal
        object.__setattr__(self, "name", f"dual({primal.name})")
        object.__setattr__(self, "f_prime_at_zero", -primal.conjugate_at_the_end())
        object.__setattr__(self, "f_prime_at_infinity", primal.limit_at_zero())
        object.__setattr__(self, "second_derivative_at_one", primal.second_derivative_at_one)

    @override
    def dual(self) -> Divergence:
        return self.primal

    @override
    def _value(self, log_u: Tensor) -> Tensor:
        return log_u.exp() * self.primal._value(-log_u)

    @override
    def _slope(self, log_u: Tensor) -> Tensor:
        return _DualSlope.apply(log_u, self)  # pyright: ignore[reportReturnType]

    @cached_property
    @override
    def _slope_from(self) -> float:
        # On the left f°' is a difference. Where rounding error dominates it, its tangent line is more accurate.
        x = GRID[GRID >= 0]
        value, growth, rounding = self.primal.conjugate_of_slope(x)
        lost = (rounding > 1e-9 * (1 + value.abs())) & (growth < 1e3 * rounding)
        return -x[lost].min().item() if lost.any() else -math.inf

    @override
    def _rate(self, log_u: Tensor) -> Tensor:
        return (-log_u).exp() * self.primal._rate(-log_u)  # v² f''(v)


class _DualSlope(torch.autograd.Function):
    """``f(v) - v f'(v)``, with the derivative ``v² f''(v)`` in ``log u``; autograd would compute a difference."""

    @staticmethod
    def forward(ctx: Any, log_u: Tensor, dual: GeneratorDual) -> Tensor:
        ctx.save_for_backward(log_u)
        ctx.dual = dual
        return -dual.primal.conjugate_of_slope_at((-log_u).exp())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (log_u,) = ctx.saved_tensors
        return grads[0] * ctx.dual._rate(log_u), None


def _slope(f: Generator, u: Tensor) -> Tensor:
    """``f'(u)`` of an elementwise f, differentiable again if u requires a gradient."""
    with torch.inference_mode(False), torch.enable_grad():
        at = u if u.requires_grad else u.detach().clone().requires_grad_()
        value = f(at)
        if not value.requires_grad:  # f is f' of a line, which is a constant
            return torch.zeros_like(at)
        (slope,) = torch.autograd.grad(value.sum(), at, create_graph=u.requires_grad, materialize_grads=True)
    return slope


def _value_and_slope(f: Generator, u: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        value = f(u)
    return value, _slope(f, u)


def _check(f: Generator, name: str) -> None:
    """Refuse a generator that cannot define a divergence."""
    u = GRID.exp()
    with torch.inference_mode(False), torch.enable_grad():
        value = f(u.clone().requires_grad_())
    if not isinstance(value, Tensor) or value.dtype != u.dtype:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"The generator {name!r} returned {got} for u in torch.float64; it must keep tensor and dtype.")
    if value.shape != u.shape:
        raise ValueError(
            f"The generator {name!r} is not elementwise: for u of shape {tuple(u.shape)} it returned "
            f"{tuple(value.shape)}."
        )
    if not value.requires_grad:
        raise ValueError(
            f"The generator {name!r} is affine (constant), or not a differentiable torch function of u: autograd finds "
            "no way from its result back to u."
        )
    value, slope = value.detach(), _slope(f, u)
    if not (torch.isfinite(value).all() and torch.isfinite(slope).all()):
        where = u[~(torch.isfinite(value) & torch.isfinite(slope))][0].item()
        raise ValueError(
            f"The generator {name!r} is not finite at u = {where:.3g}; f and f' must be finite for |log u| ≤ 30. (In "
            "torch.where the branch that is not taken must be finite, too.)"
        )
    rounding = _rounding(lambda v: _slope(f, v), u)
    if (lost := rounding > 0.01 * (1 + slope.abs())).any():
        where = u[lost][0].item()
        raise ValueError(
            f"f' of the generator {name!r} is lost in rounding at u = {where:.3g} ({slope[lost][0].item():.3g} ± "
            f"{rounding[lost][0].item():.1g}): write f without differences of large numbers."
        )
    fall = slope.diff() < -(1e-9 * (1 + slope[1:].abs()) + 10 * torch.maximum(rounding[1:], rounding[:-1]))
    if fall.any():
        where = u[1:][fall][0].item()
        raise ValueError(f"The generator {name!r} is not convex: f' falls near u = {where:.3g}.")
    if (slope - slope[0]).abs().max() <= 1e-12 * slope.abs().max():
        raise ValueError(
            f"The generator {name!r} is affine (f'' = 0): its divergence is 0 between any two distributions; give an f "
            "that is curved somewhere."
        )


def _rounding(rising: Generator, u: Tensor) -> Tensor:
    """The rounding error of a non-decreasing function: how far it falls between neighbors of u."""
    # Steps of a few units in the last place: any fall of a non-decreasing function between them is rounding error.
    near = torch.stack([rising(u * (1 + k * 2.0**-50)) for k in (-3, -2, -1, 0, 1, 2, 3)])
    return (near.cummax(dim=0).values - near).amax(dim=0)


def _second_derivative_at_one(f: Generator) -> float:
    """``f''(1)``; NaN at a kink, where the slopes on both sides do not agree with it."""
    # f' rises by about 2 w f''(1) over [1 - w, 1 + w]; at a kink the rise does not shrink with w.
    width = torch.tensor([1e-5, 1e-6], dtype=torch.float64)
    curvature = _slope(lambda u: _slope(f, u), torch.ones(1, dtype=torch.float64)).item()
    rise = _slope(f, 1 + width) - _slope(f, 1 - width)
    gap = (rise - 2 * width * curvature).abs()
    return curvature if (gap <= 0.01 * 2 * width * abs(curvature) + 1e-9 * (1 + rise.abs())).all() else math.nan


def _measured_limit(f: Generator, sign: int, slope_at_one: float) -> tuple[float | None, float]:
    """Return the limit of f' (None if it is unclear), and f' as far out as it is finite and accurate.

    The limit is finite if doubling ``log u`` hardly changes f', and infinite if f' keeps growing.
    """
    for scale in LIMIT_SCALES:
        u = (sign * scale * torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)).exp()
        slope = _slope(f, u)
        if not torch.isfinite(slope).all() or (_rounding(lambda v: _slope(f, v), u) > 1e-9 * (1 + slope.abs())).any():
            continue
        near, middle, far = slope.tolist()
        first, second = abs(middle - near), abs(far - middle)
        if second <= max(1e-9 * (1 + abs(far)), 1e-3 * first):
            return far - slope_at_one, far - slope_at_one
        if second >= 1.5 * first:  # a logarithm doubles its step with its argument, a power grows faster
            return sign * math.inf, far - slope_at_one
        return None, far - slope_at_one
    return None, _slope(f, torch.tensor(sign * LINEAR_BEYOND, dtype=torch.float64).exp()).item() - slope_at_one


def _limit_of_tail(value: float, growth: list[float], *, step: float, negligible: float, tolerance: float) -> float:
    """The limit of a rising function of x, from its value at a point, and its growth there and ``step`` before.

    Growth of ``e^{-ax}`` has a finite sum; growth that does not fall has an infinite one.
    """
    # With growth c e^{-ax} per unit of x the tail ∫ c e^{-at} dt from x on is its present growth over a, and
    # log(now/before)/step is -a.
    before, now = growth
    if now <= negligible:
        return value
    exponent = math.log(now / before) / step
    return math.inf if exponent > -tolerance else value - now / exponent
