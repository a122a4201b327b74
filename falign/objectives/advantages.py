"""Advantages: from the rewards of a rollout to the weights of its completions' log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from falign.divergences.dtypes import numbers
from falign.objectives.groups import groups_of, mean_of_others, smallest, total
from falign.registry import Registry

__all__ = [
    "ADVANTAGES",
    "Advantage",
    "batch_mean",
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
    centred, deviation = group_centred(rewards, prompt_index), group_deviation(rewards, prompt_index)
    return torch.where(deviation == 0, torch.zeros_like(centred), centred / (deviation + eps))


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
