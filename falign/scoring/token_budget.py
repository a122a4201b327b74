"""Batches limited by tokens instead of rows: as many trees of similar length as a budget allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from falign.seeds import mixed

__all__ = ["TokenBudgetBatches"]

_WINDOW = 16  # batches per window; trees are sorted by length within a window


class TokenBudgetBatches:
    """Lists of indices whose lengths sum to at most a budget; a batch sampler for a data loader.

    The batches of an epoch depend only on seed and epoch, so a run can resume by skipping batches. Each epoch shuffles
    the trees, sorts them by length within windows, splits the windows into batches, and shuffles the batches: trees of
    a batch have similar lengths, and the order is random otherwise.

    Args:
        lengths: Tokens of each tree.
        max_tokens: The budget; at least the length of the longest tree.
        seed: Seed of the order.
        shuffle: False keeps the given order.

    Raises:
        ValueError: If a tree is longer than the budget, or no tree is given.

    Example:
        >>> list(TokenBudgetBatches([3, 5, 4, 2], max_tokens=8, seed=0, shuffle=False))
        [[0, 1], [2, 3]]
    """

    def __init__(self, lengths: Sequence[int], *, max_tokens: int, seed: int, shuffle: bool = True) -> None:
        if not lengths:
            raise ValueError("lengths is empty: give the length of at least one tree.")
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > max_tokens:
            raise ValueError(
                f"max_tokens={max_tokens} is less than the {lengths[longest]} tokens of tree {longest}: raise it, or "
                "shorten the data (data.max_length)."
            )
        self.lengths, self.max_tokens, self.seed, self.shuffle = lengths, max_tokens, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch from now on."""
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
