"""The protocol of an f-divergence: a convex generator, its derivative, inverse and conjugate, as functions of log u."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from typing_extensions import override

__all__ = ["Divergence", "Standardized", "numbers"]


class Divergence(ABC):
    """An f-divergence ``D_f(π‖π_ref) = E_ref[f(u)]``, with ``u = π/π_ref`` and ``f(1) = f'(1) = 0``.

    Every method takes ``log u`` in nats, of any shape and floating dtype, and returns that shape and dtype;
    half precisions are computed in float32, integers and booleans are converted to torch's default dtype. For
    ``|log u| ≤ 30`` values agree with exact arithmetic to a relative 1e-6 (float32) or 1e-10 (float64), also near
    u = 1; beyond, growing exponentials continue as their tangent lines, so that values and gradients are finite for
    ``|log u| ≤ 1e4`` in float32 and bfloat16. In float32 a power of u turns into its tangent at e^60 already where that
    comes before 30 nats, as in ``alpha(a)`` for a > 2 or a < -1.

    Attributes:
        name: Its name for :func:`falign.divergences.get`.
        f_prime_at_zero: ``f'(0+)``, may be -inf.
        f_prime_at_infinity: ``f'(∞)``, may be +inf.
        second_derivative_at_one: ``f''(1)``; NaN where f has a kink at 1.

    Source:
        Csiszár 1967; the normal form adds ``c (u - 1)`` to the textbook generator, which changes no divergence.

    Example:
        >>> from falign.divergences import get
        >>> get("reverse_kl").f_prime(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-1.,  0.,  2.])
    """

    name: str
    f_prime_at_zero: float
    f_prime_at_infinity: float
    second_derivative_at_one: float

    @property
    def has_barrier(self) -> bool:
        """True if ``f'(0+) = -inf``: no outcome gets probability 0, which f-DPO's closed form needs."""
        return self.f_prime_at_zero == -math.inf

    def f(self, log_u: Shaped[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Return ``f(u)``, the generator: non-negative, zero at u = 1, convex in u.

        Args:
            log_u: ``log u``, any shape, nats.

        Returns:
            ``f(u)``, same shape and dtype; differentiable.
        """
        return _in_its_dtype(self._f, log_u, "log_u")

    def f_prime(self, log_u: Shaped[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Return ``f'(u)``, the derivative in u: zero at u = 1, non-decreasing.

        Args:
            log_u: ``log u``, any shape, nats.

        Returns:
            ``f'(u)``, same shape and dtype; differentiable. It is the reward of f-DPO over β, and the policy-gradient
            penalty that has the gradient of ``D_f``.
        """
        return _in_its_dtype(self._f_prime, log_u, "log_u")

    def f_prime_inverse(self, y: Shaped[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Return the ``log u`` at which ``f'(u) = y``.

        Args:
            y: Values of f', any shape.

        Returns:
            ``log u``; -inf where ``y ≤ f'(0+)`` and +inf where ``y ≥ f'(∞)``. It inverts the formula, not the tangent
            lines of :meth:`f_prime` beyond 30 nats.
        """
        return _in_its_dtype(self._inverse_or_infinity, y, "y")

    def conjugate(self, y: Shaped[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Return the convex conjugate ``f*(y) = sup_{u ≥ 0} (u y - f(u))``.

        Args:
            y: Any shape.

        Returns:
            ``f*(y)``: ``-f(0)`` where ``y ≤ f'(0+)``, +inf where ``y > f'(∞)``.
        """

        def conjugate(v: Tensor) -> Tensor:
            value = self._conjugate_at(self._inverse_or_infinity(v), v)
            return torch.where(v > self.f_prime_at_infinity, torch.full_like(v, math.inf), value)

        return _in_its_dtype(conjugate, y, "y")

    @abstractmethod
    def dual(self) -> Divergence:
        """Return the divergence of ``u f(1/u)``, which swaps the arguments: ``D_f°(p‖q) = D_f(q‖p)``."""

    def standardized(self) -> Divergence:
        """Return the same divergence scaled to ``f''(1) = 1``, so that one β has one local strength for every f.

        Raises:
            ValueError: f has no second derivative at 1 (total variation), or it is 0.
        """
        if math.isnan(self.second_derivative_at_one):
            raise ValueError(f"{self.name} has a kink at u = 1: f''(1) does not exist, so it cannot be standardized.")
        if self.second_derivative_at_one == 0.0:
            raise ValueError(f"{self.name} is flat at u = 1: f''(1) = 0, so no scale makes it 1.")
        return self if self.second_derivative_at_one == 1.0 else Standardized(self)

    def _inverse_or_infinity(self, y: Tensor) -> Tensor:
        above, below = y >= self.f_prime_at_infinity, y <= self.f_prime_at_zero
        # y outside of the range is replaced before the formula, so that neither value nor gradient becomes NaN.
        inside = torch.where(above | below, torch.zeros_like(y), y)
        value = self._f_prime_inverse(inside)
        value = torch.where(above, torch.full_like(y, math.inf), value)
        return torch.where(below, torch.full_like(y, -math.inf), value)

    @abstractmethod
    def _f(self, log_u: Tensor) -> Tensor: ...

    @abstractmethod
    def _f_prime(self, log_u: Tensor) -> Tensor: ...

    @abstractmethod
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        """``log u`` for y strictly inside the range of f'."""

    @abstractmethod
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        """``u y - f(u)`` at the maximizer, ``f'(u) = y``, simplified so that nothing cancels."""


def _in_its_dtype(function: Callable[[Tensor], Tensor], x: Tensor, name: str) -> Tensor:
    value = function(numbers(x, name))
    return value.to(x.dtype) if x.is_floating_point() else value


@dataclass(frozen=True)
class Standardized(Divergence):
    """``f/f''(1)`` of another divergence.

    Source:
        ``D_f ≈ f''(1)/2 · χ²(π‖π_ref)`` near the reference for every f, so this makes all strengths equal there.

    Example:
        >>> from falign.divergences import get
        >>> get("pearson_chi2").standardized().f_prime(torch.tensor(0.01))  # 2(u - 1)/2
        tensor(0.0101)
    """

    divergence: Divergence

    def __post_init__(self) -> None:
        inner, scale = self.divergence, self._scale
        object.__setattr__(self, "name", f"standardized({inner.name})")
        object.__setattr__(self, "f_prime_at_zero", scale * inner.f_prime_at_zero)
        object.__setattr__(self, "f_prime_at_infinity", scale * inner.f_prime_at_infinity)
        object.__setattr__(self, "second_derivative_at_one", 1.0)

    @property
    def _scale(self) -> float:
        return 1.0 / self.divergence.second_derivative_at_one

    @override
    def dual(self) -> Divergence:
        return self.divergence.dual().standardized()

    @override
    def _f(self, log_u: Tensor) -> Tensor:
        return self._scale * self.divergence._f(log_u)

    @override
    def _f_prime(self, log_u: Tensor) -> Tensor:
        return self._scale * self.divergence._f_prime(log_u)

    @override
    def _f_prime_inverse(self, y: Tensor) -> Tensor:
        return self.divergence._f_prime_inverse(y / self._scale)

    @override
    def _conjugate_at(self, log_u: Tensor, y: Tensor) -> Tensor:
        return self._scale * self.divergence._conjugate_at(log_u, y / self._scale)


def numbers(x: Shaped[Tensor, "*S"], name: str) -> Float[Tensor, "*S"]:
    """Return x in at least float32.

    Args:
        x: Any real dtype, any shape.
        name: Its name in messages.

    Returns:
        x itself in float32 and float64; half precision as float32, integers and booleans as torch's default dtype
        (float32 where that is a half precision).

    Raises:
        TypeError: x is complex, or not a tensor.

    Example:
        >>> numbers(torch.tensor([True, False]), "rewards")
        tensor([1., 0.])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor: pass torch.tensor(...).")
    if x.is_complex():
        raise TypeError(f"{name} has dtype {x.dtype}; it must be real.")
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return x.to(torch.promote_types(dtype, torch.float32))
