"""Float32 copies of low-precision weights, which take the optimizer's steps; the model has them rounded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MasterWeights", "share_below_rounding"]

MASTERS = "master_weights"
"""The key of an optimizer's state with the copies."""


class MasterWeights:
    """Let an optimizer step on float32 copies of a model's parameters, which then get the rounded copies.

    bfloat16 has 8 bits of precision: a weight w changes only by steps above |w|/512, so that most updates of a small
    learning rate are rounded away. Their sum is kept in the copies. The optimizer's moments are float32 too.

    Args:
        optimizer: The optimizer, before its first step; its parameter groups get the copies. Its state then holds them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for group in optimizer.param_groups:
            group["params"] = [self._copied(each) for each in group["params"]]
        optimizer.register_step_pre_hook(self._take_gradients)
        optimizer.register_step_post_hook(self._round)
        optimizer.register_state_dict_post_hook(self._to_state)
        optimizer.register_load_state_dict_pre_hook(self._from_state)

    def _copied(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype == torch.float32:
            return parameter
        master = nn.Parameter(parameter.detach().float())
        self.pairs.append((parameter, master))
        return master

    def _take_gradients(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for parameter, master in self.pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()

    @torch.no_grad()
    def _round(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for parameter, master in self.pairs:
            if master.grad is not None:
                parameter.copy_(master)
                master.grad = None

    def _to_state(self, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, MASTERS: [master.detach() for _, master in self.pairs]}

    @torch.no_grad()
    def _from_state(self, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        for (_, master), saved in zip(self.pairs, state[MASTERS], strict=True):
            master.copy_(saved)
        return {name: value for name, value in state.items() if name != MASTERS}


@torch.no_grad()
def share_below_rounding(parameters: Iterable[Tensor], learning_rate: float) -> float:
    """Return the share of weights that an update of ``±learning_rate``, the size of Adam's, leaves as they are.

    Args:
        parameters: Weights of a low precision.
        learning_rate: The size of the update.
    """
    lost = total = 0
    for weight in parameters:
        up, down = ((weight.float() + step).to(weight.dtype) for step in (learning_rate, -learning_rate))
        lost, total = lost + int(((up == weight) & (down == weight)).sum()), total + weight.numel()
    return lost / max(total, 1)
