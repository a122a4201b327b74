"""Metrics of groups of rewards: pass@k, best of n, groups without a signal, win rates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "TOLERANCE",
    "GroupShares",
    "best_of_n",
    "calibrate",
    "group_shares",
    "keep",
    "outside",
    "pass_at_k",
    "pass_rates",
    "passes",
    "powers_of_two",
]

TOLERANCE = 1e-6
"""Margin below the passing reward within which a completion still passes, because rewards are sums of floats."""


class GroupShares(NamedTuple):
    """Shares of the prompts; the first three add up to 1.

    Attributes:
        all_pass: Every completion passes.
        all_fail: No completion passes.
        mixed: Some completions pass.
        no_signal: All rewards are equal, so that centered rewards are zero and nothing is learned.
    """

    all_pass: float
    all_fail: float
    mixed: float
    no_signal: float


def pass_at_k(num_samples: int, num_correct: Int[Tensor, "*P"], k: int) -> Float[Tensor, "*P"]:
    """Return ``1 - C(n-c, k)/C(n, k)``, the unbiased estimate that one of k samples is correct.

    Args:
        num_samples: n, samples per prompt.
        num_correct: c, how many of them are correct, any shape.
        k: At most n.

    Returns:
        One estimate per prompt, in float64; its mean over prompts is pass@k.

    Raises:
        ValueError: ``k`` is not between 1 and n, or a count is not between 0 and n.

    Source:
        Chen et al. (arXiv:2107.03374), Eq. 1, as the product ``Π_{i=n-c+1}^{n} (1 - k/i)``.

    Example:
        >>> pass_at_k(4, torch.tensor([0, 1, 2, 4]), 2)
        tensor([0.0000, 0.5000, 0.8333, 1.0000], dtype=torch.float64)
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k} must be between 1 and the {num_samples} samples per prompt.")
    if bool(((num_correct < 0) | (num_correct > num_samples)).any()):
        raise ValueError(f"num_correct has values outside 0 to {num_samples}, the samples per prompt.")
    i = torch.arange(1, num_samples + 1, dtype=torch.float64, device=num_correct.device)
    # Below i = k a factor would be negative; then n - c < k, and every choice of k has a correct one.
    factors = (1 - k / i).clamp(min=0.0)
    counted = i > (num_samples - num_correct)[..., None]
    return 1 - torch.where(counted, factors, 1.0).prod(dim=-1)


def best_of_n(rewards: Float[Tensor, "*P G"], n: int) -> Float[Tensor, "*P"]:
    """Return the mean of the largest of n rewards over all ways to choose n of the G: unbiased for best of n.

    ``Σ_i C(i-1, n-1)/C(G, n) r_(i)`` with the rewards in rising order.

    Args:
        rewards: Of G completions per prompt.
        n: At most G.

    Returns:
        One estimate per prompt, in float64.

    Raises:
        ValueError: ``n`` is not between 1 and G.

    Source:
        The distribution of the maximum of a sample without replacement; for rewards 0 and 1 it is :func:`pass_at_k`.

    Example:
        >>> best_of_n(torch.tensor([1.0, 3.0, 2.0]), 2)  # maxima of the pairs: 3, 2, 3
        tensor(2.6667, dtype=torch.float64)
    """
    group_size = rewards.shape[-1]
    if not 1 <= n <= group_size:
        raise ValueError(f"n={n} must be between 1 and the {group_size} rewards per prompt.")
    # The largest has weight n/G, and each one below it (i - n)/(i - 1) of the weight above: no factorials.
    i = torch.arange(group_size, 1, -1, dtype=torch.float64, device=rewards.device)
    shrinking = torch.cumprod((i - n).clamp(min=0.0) / (i - 1), dim=0)
    weights = n / group_size * torch.cat([shrinking.new_ones(1), shrinking])
    return (rewards.double().sort(dim=-1, descending=True).values * weights).sum(dim=-1)


def powers_of_two(largest: int) -> list[int]:
    """Return 1, 2, 4 ... up to ``largest``, and ``largest`` itself: the k of pass@k and of the best of k.

    Args:
        largest: At least 1.

    Example:
        >>> powers_of_two(6)
        [1, 2, 4, 6]
    """
    powers = [2**i for i in range(largest.bit_length()) if 2**i <= largest]
    return powers if powers[-1] == largest else [*powers, largest]


def passes(reward: Any, threshold: float = 1.0, *, tolerance: float = TOLERANCE) -> Any:
    """Return whether a reward, or each of a tensor of rewards, passes.

    Args:
        reward: A number or a tensor.
        threshold: Smallest reward that passes.
        tolerance: Margin below the threshold within which rewards still pass.
    """
    return reward >= threshold - tolerance


def group_shares(rewards: Float[Tensor, "P G"], *, threshold: float = 1.0, tolerance: float = TOLERANCE) -> GroupShares:
    """Return how many prompts have completions that all pass, all fail, or neither.

    Args:
        rewards: The outcome of the task, without shaping terms.
        threshold: Smallest reward that passes.
        tolerance: Margin below the threshold within which rewards still pass, and difference of equal rewards.

    Returns:
        The shares.
    """
    passes = pass_rates(rewards, threshold=threshold, tolerance=tolerance)
    spread = rewards.amax(dim=-1) - rewards.amin(dim=-1)
    all_pass = (passes == 1.0).double().mean().item()
    all_fail = (passes == 0.0).double().mean().item()
    mixed = ((passes > 0.0) & (passes < 1.0)).double().mean().item()
    return GroupShares(all_pass, all_fail, mixed, (spread <= tolerance).double().mean().item())


def pass_rates(
    rewards: Float[Tensor, "*P G"], *, threshold: float = 1.0, tolerance: float = TOLERANCE
) -> Float[Tensor, "*P"]:
    """Return the share of each prompt's completions that pass; the arguments are those of :func:`group_shares`."""
    return passes(rewards, threshold, tolerance=tolerance).double().mean(dim=-1)


def keep(rates: Float[Tensor, "*P"], low: float, high: float) -> Bool[Tensor, "*P"]:
    """Return which prompts are neither too hard nor too easy.

    Args:
        rates: Rates of passing under the current policy.
        low: Smallest rate to keep.
        high: Largest rate to keep.

    Returns:
        True where ``low ≤ rate ≤ high``.

    Raises:
        ValueError: The bounds are not in order.

    Source:
        Bae et al. (arXiv:2504.03380): what can be learned from a prompt grows with ``p (1 - p)``.

    Example:
        >>> keep(torch.tensor([0.0, 0.25, 1.0]), 0.2, 0.8)
        tensor([False,  True, False])
    """
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"low={low}, high={high}: they must satisfy 0 <= low <= high <= 1.")
    return outside(rates, low, high) == 0.0


def outside(rates: Float[Tensor, "*P"], low: float, high: float) -> Float[Tensor, "*P"]:
    """Return the distance of rates of passing from a range; 0 within it.

    Args:
        rates: Rates of passing.
        low: Smallest rate of the range.
        high: Largest rate of the range.

    Example:
        >>> outside(torch.tensor([0.0, 0.25, 1.0]), 0.25, 0.5)
        tensor([0.2500, 0.0000, 0.5000])
    """
    return torch.maximum(low - rates, rates - high).clamp(min=0.0)


def calibrate(rewards: Float[Tensor, "P G"], reference_rewards: Float[Tensor, "P K"]) -> Float[Tensor, "P G"]:
    """Return each completion's win rate against the reference's samples for its prompt, ties counting one half.

    Args:
        rewards: Of G completions of each prompt.
        reference_rewards: Of K samples of the reference, drawn once and kept.

    Returns:
        Between 0 and 1. For completions of the reference without ties it is uniform, whatever the reward's scale.

    Source:
        Balashankar et al., InfAlign-CTRL (arXiv:2412.19792): ``P(r(z) < r(y)) + P(r(z) = r(y))/2``.

    Example:
        >>> calibrate(torch.tensor([[2.0, 5.0]]), torch.tensor([[1.0, 2.0, 2.0, 3.0]]))
        tensor([[0.5000, 1.0000]])
    """
    ours, theirs = rewards[:, :, None], reference_rewards[:, None, :]
    return ((theirs < ours).to(rewards.dtype) + 0.5 * (theirs == ours).to(rewards.dtype)).mean(dim=-1)
