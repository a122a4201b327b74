"""Modules inside adapters that keep float32 weights for the optimizer and compute in the type of the activations."""

from typing import cast

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

__all__ = ["CastLinear", "ExactDora", "StartedDown", "StartedMatrix", "StartedUp", "keep_float32"]


class CastLinear(nn.Linear):
    """A linear layer that casts its weights to the type of its input."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class StartedMatrix(CastLinear):
    """One matrix of an update ``B A - B₀ A₀`` that is zero at first although B and A are not.

    PiSSA and OLoRA begin with factors of the base's own weight. PEFT subtracts ``B₀ A₀`` from that weight; here it is
    subtracted in the adapter, so that the base stays the model it was: the reference, the hashes and other adapters
    over it are right. The matrices are those of a plain adapter of twice the rank: ``[B, -B₀]`` and ``[A; A₀]``, of
    which the second halves take no gradient.

    The layer computes ``(B - B₀) A + B₀ (A - A₀)``, the same update without the difference of two large products: it
    is exactly zero at first, and small changes survive 16-bit arithmetic.
    """

    def plain(self) -> Tensor:
        """Return the matrix by which this layer multiplies, in float32; its product with the other is the update."""
        raise NotImplementedError

    @override
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.plain().to(input.dtype))


class StartedDown(StartedMatrix):
    """``[A; A - A₀]``, of shape (2r, in)."""

    @override
    def plain(self) -> Tensor:
        trained, start = self.weight.chunk(2, dim=0)
        return torch.cat([trained, trained - start.detach()], dim=0)


class StartedUp(StartedMatrix):
    """``[B - B₀, B₀]``, of shape (out, 2r)."""

    @override
    def plain(self) -> Tensor:
        trained, negative = self.weight.chunk(2, dim=1)
        return torch.cat([trained + negative.detach(), -negative.detach()], dim=1)


class ExactDora(DoraLinearLayer):
    """DoRA's magnitudes, with norms in float32.

    PEFT computes the norms in the type of the activations. In bfloat16 they move in steps of 0.4 %, and the magnitudes,
    which change less than that in a run, would be divided by this rounding.
    """

    @override
    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        whole = cast("Tensor", transpose(weight, self.fan_in_fan_out))
        return torch.linalg.norm(whole.float() + scaling * lora_weight.float(), dim=1)


def keep_float32(module: nn.Module) -> None:
    """Convert 16-bit weights of a trained module to float32 in place; it returns its former type.

    A step of the optimizer is mostly smaller than the rounding of 16-bit weights, and would be lost.
    """
    for part in module.modules():
        own = [weight for weight in part.parameters(recurse=False) if weight.dtype in (torch.bfloat16, torch.float16)]
        if not own:
            continue
        computes_in = own[0].dtype
        for weight in own:
            weight.data = weight.data.float()
        kind: type[nn.Module] = type(part)
        part.__class__ = CastLinear if kind is nn.Linear else _casting(kind, computes_in)  # pyright: ignore


def _casting(kind: type[nn.Module], computes_in: torch.dtype) -> type[nn.Module]:
    """Return a class of module whose output has a type."""

    class Casting(kind):
        @override
        def forward(self, *args: object, **kwargs: object) -> Tensor:
            return super().forward(*args, **kwargs).to(computes_in)

    Casting.__name__ = Casting.__qualname__ = kind.__name__
    return Casting
