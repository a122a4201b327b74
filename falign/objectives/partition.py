"""Leave-one-out estimates of a target's normalizer ``Z(x) = E_q[P/q]`` for each prompt."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from falign.divergences.base import numbers
from falign.objectives.groups import groups_of, logsumexp_of_others

__all__ = ["RunningPartition", "log_partition"]


def log_partition(
    log_weights: Shaped[Tensor, " N"],
    prompt_index: Int[Tensor, " N"],
    *,
    earlier_log_sum: Shaped[Tensor, " N"] | None = None,
    earlier_count: Shaped[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """Return ``log Z(x)`` for each sample: the log of the mean weight of the *other* samples of its prompt.

    Args:
        log_weights: ``log P/q`` of samples of q, shape (N,), nats; -inf where ``P = 0``.
        prompt_index: Which prompt, shape (N,).
        earlier_log_sum: ``log Σ P/q`` over earlier samples of its prompt, shape (N,); -inf if there are none.
        earlier_count: Number of these earlier samples, shape (N,).

    Returns:
        Shape (N,); -inf if there is no other sample, or all others have weight 0: Z is unknown there.

    Source:
        Go et al., f-DPG (arXiv:2302.08215), Section 3.3, importance sampling of Z. Their code includes each sample in
        the estimate that it is compared with, which correlates the two; here it is left out.

    Example:
        >>> log_partition(torch.tensor([0.0, 1.0, 2.0]).log(), torch.tensor([0, 0, 0])).exp()
        tensor([1.5000, 1.0000, 0.5000])
    """
    groups, log_weights = groups_of(prompt_index), numbers(log_weights, "log_weights")
    log_sum, count = logsumexp_of_others(log_weights, groups), (groups.size - 1).to(log_weights.dtype)
    if earlier_log_sum is not None and earlier_count is not None:
        log_sum, count = torch.logaddexp(log_sum, earlier_log_sum), count + earlier_count
    return log_sum - count.clamp(min=1.0).log()


class RunningPartition:
    """Sums of weights per prompt over all steps so far; p is fixed, so samples of any step stay valid.

    Source:
        Go et al., f-DPG (arXiv:2302.08215), Section 3.3: a moving average for each prompt.

    Example:
        >>> running = RunningPartition()
        >>> running.update(["x", "x"], torch.tensor([1.0, 3.0]).log()).exp()
        tensor([3., 1.])
        >>> running.update(["x"], torch.tensor([9.0]).log()).exp()  # the mean of 1 and 3, from before
        tensor([2.])
    """

    def __init__(self) -> None:
        self._sums: dict[Hashable, tuple[float, int]] = {}

    def update(self, keys: Sequence[Hashable], log_weights: Shaped[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return ``log Z`` for each sample from all others of its prompt so far; then add these samples to the sums.

        Args:
            keys: The prompt of each sample.
            log_weights: ``log P/q`` of samples of q, shape (N,), nats; -inf where ``P = 0``.

        Returns:
            Shape (N,), without gradient; -inf where Z is unknown.

        Raises:
            ValueError: The numbers of keys and weights differ.
        """
        if len(keys) != len(log_weights):
            raise ValueError(f"{len(keys)} keys for {len(log_weights)} log_weights; one for each sample is needed.")
        rows = {key: row for row, key in enumerate(dict.fromkeys(keys))}  # groups are numbers, keys may be anything
        weights = log_weights.detach().double().cpu()
        earlier = [self._sums.get(key, (-math.inf, 0)) for key in keys]
        log_sum = torch.tensor([log_sum for log_sum, _ in earlier], dtype=torch.float64)
        count = torch.tensor([count for _, count in earlier], dtype=torch.float64)
        index = torch.tensor([rows[key] for key in keys], dtype=torch.long)
        estimates = log_partition(weights, index, earlier_log_sum=log_sum, earlier_count=count)
        # Only now, because the estimates leave out each sample itself but count the others of this step.
        for key, row in rows.items():
            own = weights[index == row]
            before, so_far = self._sums.get(key, (-math.inf, 0))
            total = torch.logaddexp(own.logsumexp(dim=0), torch.tensor(before, dtype=torch.float64))
            self._sums[key] = (total.item(), so_far + len(own))
        return estimates.to(numbers(log_weights, "log_weights"))

    def state_dict(self) -> dict[str, list[Any]]:
        """Return keys, log-sums (-inf where all weights were 0) and counts, as plain lists."""
        return {
            "keys": list(self._sums),
            "log_sums": [log_sum for log_sum, _ in self._sums.values()],
            "counts": [count for _, count in self._sums.values()],
        }

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        """Restore the state.

        Args:
            state: As returned by :meth:`state_dict`.
        """
        sums = zip(state["log_sums"], state["counts"], strict=True)
        self._sums = dict(zip(state["keys"], sums, strict=True))
