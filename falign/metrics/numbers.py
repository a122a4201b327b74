"""The dtype rule of falign.divergences for the inputs of metrics: lists, arrays and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Array", "Numbers", "float_array"]

Array = NDArray[np.float64]
Numbers = Sequence[float | int | np.number[Any] | np.bool_ | Tensor] | NDArray[Any] | Tensor


def float_array(values: Any, name: str) -> Array:
    """Return numbers as a float64 array.

    Args:
        values: :data:`Numbers`: a sequence, an array or a tensor of one dimension, of any real dtype, booleans
            included, on any device, with or without a gradient.
        name: Its name in messages.

    Returns:
        A new array of the same length.

    Raises:
        TypeError: A value is not a real number.
        ValueError: There is not exactly one dimension.

    Example:
        >>> float_array(torch.tensor([0.5, 2.0], dtype=torch.bfloat16), "rewards").tolist()
        [0.5, 2.0]
        >>> float_array([1.0, None], "rewards")
        Traceback (most recent call last):
        ...
        TypeError: rewards[1] is None; it must be a real number.
    """
    if isinstance(values, Tensor):
        if values.is_complex():
            raise TypeError(f"{name} has dtype {values.dtype}; it must be real.")
        array = values.detach().double().cpu().numpy().copy()
    elif isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        array = values.astype(np.float64)
    elif isinstance(values, Sequence | np.ndarray) and not isinstance(values, str | bytes):
        array = np.array([_number(value, f"{name}[{i}]") for i, value in enumerate(values)], dtype=np.float64)
    else:
        raise TypeError(f"{name} is a {type(values).__name__}; it must be a list, an array or a tensor of numbers.")
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; it must have one dimension.")
    return array


def _number(value: Any, name: str) -> float:
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        return float(value.detach())
    if isinstance(value, Real | np.bool_):
        return float(value)
    raise TypeError(f"{name} is {value!r}; it must be a real number.")
