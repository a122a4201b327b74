"""Generalized advantage estimation: advantages per token from rewards and a value head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from falign.divergences.dtypes import numbers

__all__ = ["generalized_advantages"]


def generalized_advantages(
    rewards_at_end: Shaped[Tensor, " N"],
    values: Shaped[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    gamma: float,
    lam: float,
) -> Float[Tensor, "N T"]:
    """Return ``A_t = Σ_{k≥t} (γλ)^{k-t} δ_k`` with ``δ_k = r_k + γ V_{k+1} - V_k``; the reward comes at the last token.

    Args:
        rewards_at_end: Reward of each completion, given at its last token, shape (N,).
        values: ``V_t``, the expected reward before token t is chosen, shape (N, T); 0 after the end.
        mask: True on completion tokens, shape (N, T); those of one completion are consecutive.
        gamma: γ, discount per token.
        lam: λ; 0 trusts the values (one step), 1 the rewards (``A_t = Σ γ^k r - V_t``).

    Returns:
        Shape (N, T), 0 outside the mask, without gradient.

    Source:
        Schulman et al., GAE (arXiv:1506.02438), Eq. 16.

    Example:
        >>> values, mask = torch.tensor([[0.5, 0.25]]), torch.ones(1, 2, dtype=torch.bool)
        >>> generalized_advantages(torch.tensor([1.0]), values, mask, gamma=1.0, lam=1.0)
        tensor([[0.5000, 0.7500]])
    """
    values = numbers(values, "values").detach().masked_fill(~mask, 0.0)
    rewards_at_end = numbers(rewards_at_end, "rewards_at_end").detach()
    remaining = mask.flip(-1).cumsum(dim=-1).flip(-1)
    rewards = torch.where(mask & (remaining == 1), rewards_at_end[:, None], torch.zeros_like(values))
    advantages = (rewards + gamma * F.pad(values, (0, 1))[:, 1:] - values).masked_fill(~mask, 0.0)
    # A_t = δ_t + γλ A_{t+1}: each round doubles the number of δ in the sum, so log₂ T rounds suffice.
    reach, decay = 1, gamma * lam
    while reach < mask.shape[-1]:
        advantages = advantages + decay**reach * F.pad(advantages, (0, reach))[:, reach:]
        reach *= 2
    return advantages.masked_fill(~mask, 0.0)
