"""Advantages: from the rewards of a rollout to the weights of its completions' log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from falign.divergences.base import numbers
from falign.objectives.groups import groups_of, mean_of_others, smallest, total
from falign.registry import Registry

__all__ = [
    "ADVANTAGES",
    "Advantage",
    "batch_mean",
    "generalized_advantages",
    "get_advantage",
    "group_centred",
    "group_deviation",
    "group_normalised",
    "leave_one_out",
    "none",
]


Advantage = Callable[[Tensor, Tensor], Tensor]


def none(rewards: Shaped[Tensor, " N"], prompt_index: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the rewards themselves: plain REINFORCE.

    Args:
        rewards: Shape (N,).
        prompt_index: Which prompt, shape (N,).

    Returns:
        Shape (N,); unbiased, with the largest variance.

    Source:
        Williams 1992, without a baseline.

    Example:
        >>> none(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]))
        tensor([1., 3.])
    """
    return numbers(rewards, "rewards")


def batch_mean(rewards: Shaped[Tensor, " N"], prompt_index: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return each reward minus the mean of all *other* rewards of the rollout, across prompts.

    Args:
        rewards: Shape (N,).
        prompt_index: Which prompt, shape (N,).

    Returns:
        Shape (N,); unbiased, because no reward is in its own baseline.

    Raises:
        ValueError: There is only one completion.

    Source:
        Williams 1992, with the mean reward as the baseline. A mean that includes the completion's own reward would
        scale every advantage by ``1 - 1/N``.

    Example:
        >>> batch_mean(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0, 0, 1]))
        tensor([-4.5000, -1.5000,  6.0000])
    """
    return leave_one_out(rewards, torch.zeros_like(prompt_index))


def leave_one_out(rewards: Shaped[Tensor, " N"], prompt_index: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return ``r_i`` minus the mean reward of the *other* completions of its prompt.

    Args:
        rewards: Shape (N,).
        prompt_index: Which prompt, shape (N,).

    Returns:
        Shape (N,); unbiased, and exactly 0 where all rewards of a prompt are equal.

    Raises:
        ValueError: A prompt has only one completion.

    Source:
        Kool et al. 2019; Ahmadian et al., RLOO (arXiv:2402.14740), Eq. 7.

    Example:
        >>> leave_one_out(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0, 0, 0]))
        tensor([-4.5000, -1.5000,  6.0000])
    """
    groups = groups_of(prompt_index)
    if (alone := groups.size == 1).any():
        raise ValueError(
            f"prompt_index={prompt_index[alone][0].item()} has only one completion, and no other to compare with: "
            "sample two or more for each prompt, or choose advantage='batch_mean'."
        )
    rewards = numbers(rewards, "rewards")
    # Subtract the smallest reward first: equal rewards are then exact zeros, which a mean of rounded sums is not.
    above = rewards - smallest(rewards, groups)
    return above - mean_of_others(above, groups)


def group_centred(rewards: Shaped[Tensor, " N"], prompt_index: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return each reward minus the mean of its prompt, itself included.

    Args:
        rewards: Shape (N,).
        prompt_index: Which prompt, shape (N,).

    Returns:
        Shape (N,); ``1 - 1/G`` times :func:`leave_one_out` in groups of G; a penalty weighs more by ``G/(G - 1)``.

    Source:
        Liu et al., Dr. GRPO (arXiv:2503.20783), Section 3: GRPO's advantage without its division.

    Example:
        >>> group_centred(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0, 0, 0]))
        tensor([-3., -1.,  4.])
    """
    groups, rewards = groups_of(prompt_index), numbers(rewards, "rewards")
    # As in leave_one_out: equal rewards become exact zeros.
    above = rewards - smallest(rewards, groups)
    return above - total(above, groups) / groups.size


def group_deviation(rewards: Shaped[Tensor, " N"], prompt_index: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return, for each completion, the standard deviation of the rewards of its prompt.

    Args:
        rewards: Shape (N,).
        prompt_index: Which prompt, shape (N,).

    Returns:
        Shape (N,), with ``G - 1`` in the denominator; exactly 0 where all rewards of a prompt are equal.

    Example:
        >>> group_deviation(torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0, 0, 0, 1]))
        tensor([2., 2., 2., 0.])
    """
    groups = groups_of(prompt_index)
    squares = total(group_centred(rewards, prompt_index).square(), groups)
    return (squares / (groups.size - 1).clamp(min=1)).sqrt()


def group_normalised(
    rewards: Shaped[Tensor, " N"], prompt_index: Int[Tensor, " N"], eps: float = 1e-4
) -> Float[Tensor, " N"]:
    """Return ``(r - mean)/(std + eps)`` within each prompt.

    Args:
        rewards: Shape (N,).
        prompt_index: Which prompt, shape (N,).
        eps: Added to the standard deviation to keep the quotient finite, in units of reward.

    Returns:
        Shape (N,); 0 where all rewards of a prompt are equal. It is not the gradient of the mean reward: each prompt
        is weighted by the inverse of its standard deviation.

    Source:
        Shao et al., GRPO (arXiv:2402.03300), Section 4.1.2; the standard deviation with ``G - 1``, as implemented.

    Example:
        >>> group_normalised(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 0]), eps=0.0)
        tensor([-1.,  0.,  1.])
    """
    centered, deviation = group_centred(rewards, prompt_index), group_deviation(rewards, prompt_index)
    return torch.where(deviation == 0, torch.zeros_like(centered), centered / (deviation + eps))


ADVANTAGES: Registry[Advantage] = Registry(
    "advantage",
    {
        "none": none,
        "batch_mean": batch_mean,
        "leave_one_out": leave_one_out,
        "group_centred": group_centred,
        "group_normalised": group_normalised,
    },
    beside=("gae",),  # computed by PolicyGradient, from a value head
    wanted="function of rewards and prompt_index",
)


def get_advantage(name: str, *, field: str | None = None) -> Advantage:
    """Return an advantage by name.

    Args:
        name: ``none`` (REINFORCE), ``batch_mean``, ``leave_one_out`` (RLOO), ``group_centred``, ``group_normalised``
            (GRPO); or a custom ``module:function``.
        field: The run-file field that holds the name, for messages.

    Returns:
        A function of rewards and prompt index.

    Raises:
        ValueError: The name is unknown.

    Example:
        >>> get_advantage("leave_one_out") is leave_one_out
        True
    """
    return ADVANTAGES.get(name, field=field)


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
    remaining = mask.flip(-1).cumsum(dim=-1).flip(-1)  # tokens from here to the end: 1 at the last one
    rewards = torch.where(mask & (remaining == 1), rewards_at_end[:, None], torch.zeros_like(values))
    # δ_t; the value after the last token is 0.
    advantages = (rewards + gamma * F.pad(values, (0, 1))[:, 1:] - values).masked_fill(~mask, 0.0)
    # A_t = δ_t + γλ A_{t+1}: each round doubles the number of δ in the sum, so log₂ T rounds suffice.
    reach, decay = 1, gamma * lam
    while reach < mask.shape[-1]:
        advantages = advantages + decay**reach * F.pad(advantages, (0, reach))[:, reach:]
        reach *= 2
    return advantages.masked_fill(~mask, 0.0)
