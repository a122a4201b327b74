"""Linear layers with 8-bit weights of bitsandbytes, multiplied in the type of their input."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear8bitLt
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["Int8Linear", "keep_int8_weights", "restored"]

LARGEST = 127.0
"""The integer of the largest weight of a row."""


def restored(packed: Tensor, scale: Tensor) -> Tensor:
    """Return float32 weights, shape (out, in).

    Args:
        packed: Integers, shape (out, in).
        scale: The largest absolute weight of each row, shape (out,).
    """
    return packed.float() * (scale.float() / LARGEST)[:, None]


class _Product(torch.autograd.Function):
    """``x Wᵀ``; restores the weights again in the backward pass, so that the graph does not hold them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scale)
        return nn.functional.linear(x, restored(packed, scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed, scale = ctx.saved_tensors
        return grad @ restored(packed, scale).to(grad.dtype), None, None


class Int8Linear(Linear8bitLt):
    """A layer of bitsandbytes whose weights are 8-bit and whose inputs are not.

    LLM.int8() of bitsandbytes also rounds the inputs, to float16 and then to 8 bits, and keeps those columns apart that
    have an outlier anywhere in the batch: the scores of a row then depend on the rows beside it, and the gradient is
    not that of the output. Here both are those of the rounded weights.
    """

    @override
    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        product = _Product.apply(x, weight.data, weight.SCB)
        return product if self.bias is None else product + self.bias.to(x.dtype)


def keep_int8_weights(model: nn.Module) -> None:
    """Make the 8-bit layers of a model compute with their weights as they are stored, in place."""
    for module in model.modules():
        if type(module) is not Linear8bitLt:
            continue
        module.__class__ = Int8Linear
        weight: Any = module.weight
        if weight.SCB is None:  # it has moved the scales away in a forward pass
            weight.SCB, weight.CB = module.state.SCB, weight.data
