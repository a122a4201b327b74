"""Batches by tokens instead of by rows: as many trees as fit a budget, of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from falign.seeds import mixed

__all__ = ["TokenBudgetBatches"]

_WINDOW = 16  # batches' worth of trees that are sorted by length among themselves


class TokenBudgetBatches:
    """Lists of indices whose lengths sum to at most a budget; a batch sampler for a data loader.

    An epoch's batches follow from seed and epoch alone, so a run that resumes by skipping batches goes on where it was.
    The order is drawn anew each epoch; trees are sorted by length within windows of the drawn order, cut into
    batches, and the batches drawn in turn, so that batches are even in length and random otherwise.

    Args:
        lengths: Tokens of each tree.
        max_tokens: The budget; at least the longest tree.
        seed: Of the order.
        shuffle: False keeps the given order.

    Raises:
        ValueError: If a tree is longer than the budget, or no tree is given.

    Example:
        >>> list(TokenBudgetBatches([3, 5, 4, 2], max_tokens=8, seed=0, shuffle=False))
        [[0, 1], [2, 3]]
    """

    def __init__(self, lengths: Sequence[int], *, max_tokens: int, seed: int, shuffle: bool = True) -> None:
        if not lengths:
            raise ValueError("lengths is empty: give the length of one tree at least.")
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > max_tokens:
            raise ValueError(
                f"max_tokens={max_tokens} is less than the {lengths[longest]} tokens of tree {longest}: raise it, or "
                "shorten the data (data.max_length)."
            )
        self.lengths, self.max_tokens, self.seed, self.shuffle = lengths, max_tokens, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from here on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def _batches(self) -> list[list[int]]:
        if not self.shuffle:
            return self._cut(range(len(self.lengths)))
        generator = torch.Generator().manual_seed(mixed(self.seed, "rows", self.epoch))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        per_batch = max(1, self.max_tokens * len(order) // sum(self.lengths))
        size = _WINDOW * per_batch
        windows = [order[start : start + size] for start in range(0, len(order), size)]
        batches = [batch for window in windows for batch in self._cut(sorted(window, key=self.lengths.__getitem__))]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _cut(self, order: Sequence[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        room = 0
        for i in order:
            if self.lengths[i] > room:
                batches.append([])
                room = self.max_tokens
            batches[-1].append(i)
            room -= self.lengths[i]
        return batches
