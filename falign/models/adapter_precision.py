"""Adapters over 16-bit weights: float32 parameters, arithmetic in the type of the activations."""

import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from typing_extensions import override

from falign.models.structure import lora_layers

__all__ = ["compute_in_activation_type"]


def compute_in_activation_type(model: PeftModel, adapter: str) -> None:
    """Let LoRA matrices be cast to the type of what they multiply, where PEFT casts the input to theirs.

    The matrices stay float32, for the optimizer, and are small. The inputs are large: cast to float32 they would be
    kept for the backward pass once for each layer that reads them, and multiplied several times as slowly. What
    mixed-precision training does everywhere is done here without its context. Over float32 weights nothing changes.
    """
    for layer in lora_layers(model, adapter).values():
        layer.cast_input_dtype_enabled = False
        for matrices in (layer.lora_A, layer.lora_B):
            matrix = matrices[adapter]
            if type(matrix) is nn.Linear:
                matrix.__class__ = _CastLinear  # the same parameters under the same names


class _CastLinear(nn.Linear):
    @override
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))
