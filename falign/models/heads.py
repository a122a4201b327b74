"""Heads: language-model heads cut to the ids that two models share, and value heads."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from falign.errors import ModelError
from falign.models.structure import base_of

__all__ = ["ValueHead", "cut_head", "head_rows", "left_out_rows", "share_head"]


def share_head(policy: PreTrainedModel | PeftModel, other: PreTrainedModel | PeftModel) -> int:
    """Restrict two models to distributions over their shared ids, and return the number of these ids.

    Many checkpoints pad their vocabulary to a round size. The rows after the last token belong to no token but take
    part in the softmax. If one model has more rows than the other, both keep only the ids that both have: the logits of
    other ids are dropped in scores, whole distributions and samples. The weights do not change, so an export, or a
    server of the same checkpoint, has logits for all rows.

    Args:
        policy: One model.
        other: Another model with the same tokens for the ids (see `check_same_tokens`).
    """
    return cut_head(other, cut_head(policy, head_rows(other)))


def cut_head(model: PreTrainedModel | PeftModel, num_ids: int) -> int:
    """Restrict a model's distributions to the first ids, and return their number.

    Args:
        model: As for :func:`share_head`.
        num_ids: Number of ids to keep; if the model has fewer, nothing changes.
    """
    if head_rows(model) > num_ids:
        _head(base_of(model)).register_forward_hook(_FirstIds(num_ids))
    return min(head_rows(model), num_ids)


def head_rows(model: PreTrainedModel | PeftModel) -> int:
    """Return the number of ids in a model's distributions."""
    head = _head(base_of(model))
    cuts = [hook.num_ids for hook in vars(head)["_forward_hooks"].values() if isinstance(hook, _FirstIds)]
    return min([_rows(head), *cuts])


def left_out_rows(model: PreTrainedModel | PeftModel) -> int:
    """Return the number of head rows that `share_head` leaves out."""
    return _rows(_head(base_of(model))) - head_rows(model)


class _FirstIds:
    """A forward hook that keeps the logits of the first ids."""

    def __init__(self, num_ids: int) -> None:
        self.num_ids = num_ids

    def __call__(self, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        return logits[..., : self.num_ids]


def _head(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ModelError(
            f"{type(model).__name__} has no output embeddings: load it with its language-model head "
            "(AutoModelForCausalLM)."
        )
    return head


def _rows(head: nn.Module) -> int:
    rows = vars(head).get("out_features")  # also for a 4-bit layer, which has a packed weight of another shape
    weight = head.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0] if rows is None else rows)


class ValueHead(nn.Module):
    """``V(s) = w·h(s) + b``, zero at first.

    It reads detached hidden states, so that its loss does not move the policy.
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
