"""Division of training rows into micro-batches, and of micro-batches among processes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from falign.scoring import TokenBudgetBatches
from falign.seeds import mixed

__all__ = ["Batches", "RowBatches", "Share"]


class RowBatches:
    """A batch sampler with a fixed number of rows per batch.

    Args:
        num_rows: Total number of rows.
        size: Rows per batch; the last batch may be smaller.
        seed: Seed of the order; each epoch has its own order.
        shuffle: False keeps the given order.

    Example:
        >>> list(RowBatches(5, size=2, seed=0, shuffle=False))
        [[0, 1], [2, 3], [4]]
    """

    def __init__(self, num_rows: int, *, size: int, seed: int, shuffle: bool = True) -> None:
        self.num_rows, self.size, self.seed, self.shuffle = num_rows, size, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.num_rows / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.num_rows))
        if self.shuffle:
            generator = torch.Generator().manual_seed(mixed(self.seed, "rows", self.epoch))
            order = torch.randperm(self.num_rows, generator=generator).tolist()
        return iter([order[start : start + self.size] for start in range(0, self.num_rows, self.size)])


Batches = RowBatches | TokenBudgetBatches


class Share:
    """One process's part of the batches: every n-th of them.

    The n processes compute n consecutive batches at once, so a step of n processes takes the same rows as a step of one
    process with n times as many micro-batches. No row is repeated. If the number of batches is not divisible by n, the
    last processes get an empty batch, so that all have the same number.

    Args:
        batches: The batches of all processes together.
        rank: Number of this process, from 0.
        processes: Number of processes.

    Example:
        >>> list(Share(RowBatches(5, size=2, seed=0, shuffle=False), rank=1, processes=2))
        [[2, 3], []]
    """

    def __init__(self, batches: Batches, *, rank: int, processes: int) -> None:
        self.batch_sampler = batches  # transformers calls set_epoch on an attribute of this name
        self.rank, self.processes = rank, processes

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch from now on."""
        self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.batch_sampler) / self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self.batch_sampler)
        batches += [[]] * (len(self) * self.processes - len(batches))
        return iter(batches[self.rank :: self.processes])
