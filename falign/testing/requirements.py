"""Requirements of the batteries: each raises with the place and the two values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from falign.errors import CheckError

__all__ = ["gradients", "require", "require_close"]


def require(condition: bool, message: str) -> None:
    """Raise CheckError with a message unless a condition holds."""
    if not condition:
        raise CheckError(message)


def require_close(
    actual: Tensor,
    expected: Tensor,
    *,
    rtol: float,
    atol: float,
    place: str,
    at: Tensor | None = None,
    coordinate: str = "index",
) -> None:
    """Raise CheckError unless two tensors agree; the message has the element that differs most.

    Args:
        actual: What the member gives.
        expected: What it has to give.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        place: The member and the rule, for the message.
        at: Coordinate of each element, for the message; by default its index.
        coordinate: Name of that coordinate.

    Raises:
        CheckError: Shapes or values differ. Two NaN, or two equal infinities, agree.
    """
    if actual.shape != expected.shape:
        raise CheckError(f"{place}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}.")
    actual, expected = actual.detach().double(), expected.detach().double()
    if torch.allclose(actual, expected, rtol, atol, equal_nan=True):
        return
    excess = (actual - expected).abs() - atol - rtol * expected.abs()
    worst = int(torch.nan_to_num(excess, nan=torch.inf, posinf=torch.inf).flatten().argmax())
    where: object = worst if at is None else at.flatten()[worst].item()
    raise CheckError(
        f"{place}: {actual.flatten()[worst].item():.9g} instead of {expected.flatten()[worst].item():.9g} at "
        f"{coordinate} {where}."
    )


def gradients(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient by each leaf, zeros where there is none."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
