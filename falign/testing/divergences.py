"""The battery of a divergence."""

from __future__ import annotations

import math

import torch

from falign.audit import audit
from falign.divergences import Divergence
from falign.errors import CheckError
from falign.objectives import PolicyGradient, Rehearsal
from falign.testing.requirements import require, require_close

__all__ = ["check_divergence"]

MODERATE = torch.tensor([-9.0, -4.0, -1.5, -0.31, -1e-2, -1e-4, 1e-4, 1e-2, 0.31, 1.5, 4.0, 9.0], dtype=torch.float64)
GRID = torch.linspace(-1e4, 1e4, 20001, dtype=torch.float64)
FAR = torch.cat([torch.linspace(-1e4, 1e4, 4001), torch.linspace(-40, 40, 801)]).sort().values


def check_divergence(divergence: Divergence) -> None:
    """Check that a divergence keeps the contract of :class:`falign.divergences.Divergence`.

    ``f(1) = f'(1) = 0``; f is not negative, and f' does not fall; f' is the derivative of f; values and gradients are
    finite to 10⁴ nats in float32 and bfloat16; shape and dtype are kept; the stated limits, curvature, inverse,
    conjugate and dual are those of f; and the estimators have the gradient of this divergence and of no other, by
    enumeration of a small world (:func:`falign.audit`).

    Args:
        divergence: The divergence; f may have a kink at u = 1 if ``second_derivative_at_one`` is NaN.

    Raises:
        CheckError: A rule is broken; the message has the place and the value.

    Example:
        >>> from falign.divergences import get
        >>> check_divergence(get("alpha(0.4)"))
    """
    if not isinstance(divergence, Divergence):
        raise CheckError(f"{divergence!r:.80} is a {type(divergence).__name__}, not a falign Divergence.")
    for check in (
        dtypes_and_shapes,
        normal_form,
        derivative,
        finite_and_monotone,
        limits,
        curvature,
        inverse,
        conjugate,
        dual,
        estimators,
    ):
        check(divergence)


def normal_form(divergence: Divergence) -> None:
    """Values of f and f' are 0 at u = 1, and f is positive elsewhere."""
    zero = torch.zeros(1, dtype=torch.float64)
    for name, method in (("f", divergence.f), ("f'", divergence.f_prime)):
        value = method(zero).item()
        require(value == 0.0, f"{divergence.name}: {name}(1) is {value:g}; in normal form it is 0.")
    for dtype in (torch.float32, torch.float64):
        log_u = GRID.to(dtype)
        value = divergence.f(log_u)
        lowest = int(value.argmin())
        require(
            value[lowest].item() >= 0,
            f"{divergence.name}: f is {value[lowest].item():g} at log u = {log_u[lowest].item():g} in {dtype}.",
        )
        zero_away = (value == 0) & (log_u.abs() > 0.5)
        if zero_away.any():
            where = log_u[zero_away][0].item()
            raise CheckError(f"{divergence.name}: f is 0 at log u = {where:g} in {dtype}, not at u = 1 only.")


def derivative(divergence: Divergence) -> None:
    """The derivative of f is f', by autograd and by difference quotients."""
    log_u = MODERATE.clone().requires_grad_()
    for name, value in (("f", divergence.f(log_u)), ("f'", divergence.f_prime(log_u))):
        # f' of the total variation is a constant on each side of its kink.
        if name == "f" or _is_smooth(divergence):
            require(value.requires_grad, f"{divergence.name}: {name} has no gradient by log u: do not detach it.")
    (slope,) = torch.autograd.grad(divergence.f(log_u).sum(), log_u)
    place = f"{divergence.name}: the derivative of f by log u is not u f'(u)"
    expected = MODERATE.exp() * divergence.f_prime(MODERATE)
    require_close(slope, expected, rtol=1e-8, atol=1e-12, place=place, at=MODERATE, coordinate="log u =")
    kept = MODERATE.abs() > 1e-3
    at, step = MODERATE[kept], 1e-5
    quotient = (divergence.f(at + step) - divergence.f(at - step)) / (2 * step)
    require_close(quotient, expected[kept], rtol=1e-5, atol=1e-8, place=place, at=at, coordinate="log u =")


def finite_and_monotone(divergence: Divergence) -> None:
    """Values and gradients are finite to 10⁴ nats; f' never falls; f falls, then rises."""
    for dtype in (torch.float32, torch.bfloat16):
        log_u = FAR.to(dtype).requires_grad_()
        f, f_prime = divergence.f(log_u), divergence.f_prime(log_u)
        for name, value in (("f", f), ("f'", f_prime)):
            parts = [(name, value.detach())]
            if value.requires_grad:
                (slope,) = torch.autograd.grad(value.float().sum(), log_u)
                parts.append((f"the gradient of {name}", slope))
            for what, each in parts:
                bad = ~each.isfinite()
                if bad.any():
                    where = FAR[bad][0].item()
                    raise CheckError(
                        f"{divergence.name}: {what} is {each[bad][0].item()} at log u = {where:g} in {dtype}."
                    )
        # Rounding may wobble by a few units in the last place.
        wobble = 4 * torch.finfo(dtype).eps
        rise, size = f_prime.detach().double().diff(), 1 + f_prime.detach().double()[1:].abs()
        falls = rise < -wobble * size
        if falls.any():
            raise CheckError(f"{divergence.name}: f' falls near log u = {FAR[1:][falls][0].item():g} in {dtype}.")
        change, size = f.detach().double().diff(), 1 + f.detach().double()[1:].abs()
        left = log_u.detach()[1:] <= 0
        wrong = torch.where(left, change > wobble * size, change < -wobble * size)
        if wrong.any():
            raise CheckError(
                f"{divergence.name}: f does not move away from 0 near log u = {FAR[1:][wrong][0].item():g} in {dtype}."
            )


def dtypes_and_shapes(divergence: Divergence) -> None:
    """Every method keeps shape and dtype."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        log_u = torch.tensor([[-1.0, 0.0, 2.0]], dtype=dtype)
        for name in ("f", "f_prime", "f_prime_inverse", "conjugate"):
            value = getattr(divergence, name)(log_u)
            require(
                isinstance(value, torch.Tensor),
                f"{divergence.name}: {name} returned a {type(value).__name__}; it must return a tensor.",
            )
            require(
                value.dtype == dtype and value.shape == log_u.shape,
                f"{divergence.name}: {name} returned {value.dtype} of shape {tuple(value.shape)} for {dtype} of shape "
                "(1, 3).",
            )


def limits(divergence: Divergence) -> None:
    """The stated limits of f' are those that it reaches."""
    ends = divergence.f_prime(torch.tensor([-1e8, 1e8], dtype=torch.float64)).tolist()
    stated = (divergence.f_prime_at_zero, divergence.f_prime_at_infinity)
    strength = divergence.second_derivative_at_one
    far = 9.9 if math.isnan(strength) else 9.9 * min(1.0, strength)
    for name, actual, limit in zip(("f_prime_at_zero", "f_prime_at_infinity"), ends, stated, strict=True):
        reached = abs(actual) >= far if math.isinf(limit) else math.isclose(actual, limit, rel_tol=1e-2)
        require(reached, f"{divergence.name}: {name} is stated as {limit:g}, and f' is {actual:g} at the end.")
    require(divergence.has_barrier == (stated[0] == -math.inf), f"{divergence.name}: has_barrier contradicts f'(0+).")


def curvature(divergence: Divergence) -> None:
    """``f''(1)`` is as stated; NaN for a kink."""
    stated = divergence.second_derivative_at_one
    log_u = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value = divergence.f_prime(log_u)
    if math.isnan(stated):
        return
    (slope,) = torch.autograd.grad(value.sum(), log_u)  # u f''(u) at u = 1
    require(
        math.isclose(slope.item(), stated, rel_tol=1e-9, abs_tol=1e-12),
        f"{divergence.name}: second_derivative_at_one is stated as {stated:g}, and f''(1) is {slope.item():g}.",
    )


def _is_smooth(divergence: Divergence) -> bool:
    return not math.isnan(divergence.second_derivative_at_one)


def inverse(divergence: Divergence) -> None:
    """The inverse undoes f', and is infinite outside of its range."""
    if _is_smooth(divergence):
        log_u = MODERATE.clone().requires_grad_()
        y = divergence.f_prime(log_u)
        (slope,) = torch.autograd.grad(y.sum(), log_u)
        back = divergence.f_prime_inverse(y.detach())
        # Where f' saturates, log u is only as good as f'(u).
        tolerance = 1e-9 * MODERATE.abs() + 1e-14 * (1 + y.detach().abs()) / slope
        wrong = ((back - MODERATE).abs() > tolerance) & (tolerance < 0.1)
        if wrong.any():
            at = MODERATE[wrong][0].item()
            raise CheckError(
                f"{divergence.name}: f_prime_inverse(f'(u)) is {back[wrong][0].item():g} at log u = {at:g}."
            )
    low, high = divergence.f_prime_at_zero, divergence.f_prime_at_infinity
    ends = torch.tensor([low - 0.1 if math.isfinite(low) else -math.inf, high + 0.1], dtype=torch.float64)
    found = divergence.f_prime_inverse(ends).tolist()
    require(
        found == [-math.inf, math.inf],
        f"{divergence.name}: f_prime_inverse is {found} outside of the range of f'; it is [-inf, inf] there.",
    )


def conjugate(divergence: Divergence) -> None:
    """``f*(y) = sup_u (u y - f(u))``, with its values outside of the range of f'."""
    u = torch.linspace(-25, 25, 100001, dtype=torch.float64)
    low = max(divergence.f_prime_at_zero, -3.0)
    high = min(divergence.f_prime_at_infinity, 2.0)
    margin = 0.05 * (high - low)
    values = divergence.f(u)
    for y in torch.linspace(low + margin, high - margin, 7, dtype=torch.float64):
        supremum = (u.exp() * y - values).max().item()
        found = divergence.conjugate(y).item()
        require(
            abs(found - supremum) <= 5e-6 * (1 + abs(supremum)),
            f"{divergence.name}: conjugate({y.item():g}) is {found:g}, and sup u y - f(u) is {supremum:g}.",
        )
    if math.isfinite(divergence.f_prime_at_infinity):
        beyond = divergence.conjugate(torch.tensor(divergence.f_prime_at_infinity + 0.01)).item()
        require(beyond == math.inf, f"{divergence.name}: the conjugate is {beyond:g} beyond f'(∞); it is inf there.")


def dual(divergence: Divergence) -> None:
    """The dual is ``u f(1/u)``, and its dual is the divergence again."""
    other = divergence.dual()
    at = torch.tensor([-8.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 8.0], dtype=torch.float64)
    options = {"at": at, "coordinate": "log u ="}
    place = f"{divergence.name}: dual() is not u f(1/u)"
    require_close(other.f(at), at.exp() * divergence.f(-at), rtol=1e-10, atol=1e-30, place=place, **options)
    place = f"{divergence.name}: dual().dual() has another f'"
    require_close(other.dual().f_prime(at), divergence.f_prime(at), rtol=1e-12, atol=0.0, place=place, **options)


def estimators(divergence: Divergence) -> None:
    """Penalties on samples of the policy, and rehearsal on those of the reference, have the divergence's gradient."""
    cases = (
        *((PolicyGradient(divergence, 1.0, level=level), "policy") for level in ("sequence", "token", "vocabulary")),
        (Rehearsal(divergence, "sequence"), "reference"),
    )
    for objective, samples in cases:
        result = audit(objective, divergence, samples=samples, name=f"{type(objective).__name__} of {divergence.name}")
        require(result.passed is True, result.verdict)
