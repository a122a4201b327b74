"""Values of prefixes, from the policy's own hidden states."""

from __future__ import annotations

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from falign.models.structure import base_of

__all__ = ["ValueHead"]


class ValueHead(nn.Module):
    """``V(s) = w·h(s) + b``, zero at first.

    It is trained on hidden states whose gradient ends there, so that its loss does not move the policy.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel) -> ValueHead:
        """Return a head that fits a model, on its device, in float32."""
        base = base_of(model)
        assert isinstance(base, PreTrainedModel)
        return cls(base.config.get_text_config().hidden_size).to(base.device)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return one value per hidden state, shape (..., 1)."""
        return self.linear(hidden)
