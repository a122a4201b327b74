"""Heads: language-model heads cut to the ids that two models share, and value heads."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from falign.errors import ModelError
from falign.models.identity import add_tensor
from falign.models.sources import damaged
from falign.models.staging import reading
from falign.models.structure import base_of

__all__ = [
    "REWARD_HEAD",
    "DoubleValueHead",
    "RewardHead",
    "SoftMinHead",
    "ValueHead",
    "cut_head",
    "head_rows",
    "left_out_rows",
    "share_head",
]

REWARD_HEAD = "reward_head.safetensors"
"""File with the head of a reward model, beside the weights of the model under it."""


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


class RewardHead(nn.Linear):
    """``r = w·h``, without bias: the head ``score`` of a transformers sequence classifier with one label.

    Args:
        hidden_size: Size of the hidden states.
        std: Standard deviation of the first weights.
        seed: Their seed; None for weights of 0, to be loaded.
    """

    def __init__(self, hidden_size: int, *, std: float = 0.02, seed: int | None = None) -> None:
        super().__init__(hidden_size, 1, bias=False)
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        with torch.no_grad():
            self.weight.copy_(torch.randn(1, hidden_size, generator=generator) * (0.0 if seed is None else std))

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel, *, seed: int | None = None) -> RewardHead:
        """Return a head that fits a model, on its device, in float32, with the model's ``initializer_range``.

        Args:
            model: The model under the head.
            seed: Seed of the first weights; None for weights of 0.
        """
        base = base_of(model)
        assert isinstance(base, PreTrainedModel)
        text = base.config.get_text_config()
        std = getattr(text, "initializer_range", 0.02)
        return cls(text.hidden_size, std=std, seed=seed).to(base.device)

    @property
    def content_hash(self) -> str:
        """A hash of its weights."""
        digest = hashlib.sha256()
        add_tensor(digest, "weight", self.weight.detach())
        return digest.hexdigest()

    @classmethod
    def read(cls, folder: Path, model: PreTrainedModel | PeftModel) -> RewardHead | None:
        """Return the head in a folder of trained weights, on the model's device; None if there is none.

        Raises:
            ModelError: The file is damaged, or belongs to another model.
        """
        file = folder / REWARD_HEAD
        if not file.is_file():
            return None
        head = cls.of(model)
        with reading(lambda error: damaged(file, error)):
            head.load_state_dict(load_file(file))
        return head.eval()


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
    def of(cls, model: PreTrainedModel | PeftModel, **settings: float) -> ValueHead:
        """Return a head that fits a model, on its device, in float32.

        Args:
            model: The policy.
            settings: Further arguments of the class.
        """
        base = base_of(model)
        assert isinstance(base, PreTrainedModel)
        return cls(base.config.get_text_config().hidden_size, **settings).to(base.device)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return one value per hidden state, shape (..., 1)."""
        return self.linear(hidden)

    @property
    def target(self) -> nn.Module:
        """The module whose values are the baseline of advantages, and from which targets are made: itself."""
        return self

    def follow(self, step: int) -> None:
        """Move a slow copy, if there is one, after an optimizer step.

        Args:
            step: Number of steps taken; a second call for the same number does nothing.
        """


class DoubleValueHead(ValueHead):
    """Two value heads, whose baseline is the soft minimum of their slow copies.

    Both learn the same targets, ``½ (V_i - target)²`` each, from different initial weights. The baseline is
    ``-α log(½ e^{-V'₁/α} + ½ e^{-V'₂/α})``: the smaller value as α → 0, the mean as α → ∞, and V where both are V. The
    copies follow as ``V' ← (1 - τ) V' + τ V`` after each optimizer step.

    Args:
        hidden_size: Size of the hidden states.
        soft_min: α, positive, in units of reward.
        polyak: τ, above 0 and at most 1; 1 for no delay.

    Source:
        Maity, SAFE (arXiv:2602.04651), whose code has α = 0.3 and τ = 0.05. The formula of its soft minimum is not
        published; this one is ours.
    """

    def __init__(self, hidden_size: int, *, soft_min: float = 0.3, polyak: float = 0.05) -> None:
        super().__init__(hidden_size)
        self.linear = nn.Linear(hidden_size, 2)
        # Equal heads would stay equal. Small weights keep the first values near 0, where a single head begins.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(2, hidden_size, generator=generator) * 0.01 / hidden_size**0.5)
            self.linear.bias.zero_()
        self.followed: Tensor
        self.slow = SoftMinHead(hidden_size, soft_min)
        self.slow.linear.load_state_dict(self.linear.state_dict())
        self.polyak = polyak
        self.register_buffer("followed", torch.zeros((), dtype=torch.long))

    @property
    @override
    def target(self) -> nn.Module:
        return self.slow

    @override
    @torch.no_grad()
    def follow(self, step: int) -> None:
        if step == self.followed:  # a checkpoint between two steps, when sampling has failed, is after this one
            return
        self.followed.fill_(step)
        for slow, fast in zip(self.slow.linear.parameters(), self.linear.parameters(), strict=True):
            slow.lerp_(fast, self.polyak)


class SoftMinHead(nn.Module):
    """The soft minimum of two linear heads, without gradient.

    Args:
        hidden_size: Size of the hidden states.
        soft_min: α.
    """

    def __init__(self, hidden_size: int, soft_min: float) -> None:
        super().__init__()
        self.linear, self.soft_min = nn.Linear(hidden_size, 2), soft_min
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return one value per hidden state, shape (..., 1)."""
        values = self.linear(hidden)
        return -self.soft_min * ((-values / self.soft_min).logsumexp(dim=-1, keepdim=True) - math.log(2))
