"""The dtype rule for the arguments of all public functions and for the fields of a batch.

Floating-point tensors are taken as they are, half precision in float32. Integers and booleans are numbers too: they are
taken in torch's default dtype, float32 at least. A complex tensor, or a value that is not a tensor, is refused by name.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["numbers"]


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
