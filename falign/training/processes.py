"""The processes of a run: launched together, each with a share of the work, one of them the writer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from falign.errors import ConfigError
from falign.objectives import CompletionBatch

__all__ = [
    "STANDS_IN",
    "Means",
    "counts",
    "gathered",
    "highest",
    "is_writer",
    "join",
    "num_processes",
    "own_batches",
    "part",
    "rank",
    "shards",
    "stand_in",
    "stand_in_loss",
    "wait",
]


T = TypeVar("T")

SHARDS = "FALIGN_SHARDS"

STANDS_IN = "stands_in"
"""Marks a micro-batch that does not count: what a process computes while the others have one batch more.

Where gradients or weights are exchanged between processes, each pass of the model is joint work, and a process without
rows would leave the others waiting.
"""


def join() -> None:
    """Take this process's place among those that a launcher started; one that was started alone is the only one."""
    on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # Accelerate takes a process without a device to be alone
    if os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError("ZeRO (DeepSpeed) is not supported: take configs/accelerate/fsdp2.yaml, or ddp.yaml.")
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError("FSDP is meant in its second version here: set fsdp_config.fsdp_version=2.")
        # Taken over: the model is sharded before anything is computed, and on CPUs, where Accelerate does not.
        os.environ[SHARDS] = "true"
    PartialState(cpu=on_cpu)


def shards() -> bool:
    """Return whether the processes share the weights of models (FSDP2); else each has them whole (DDP)."""
    return num_processes() > 1 and os.environ.get(SHARDS) == "true"


def num_processes() -> int:
    """Return how many processes the run has."""
    return PartialState().num_processes


def rank() -> int:
    """Return the number of this process, from 0."""
    return PartialState().process_index


def is_writer() -> bool:
    """Return whether this is the process that writes the run folder and talks to the user."""
    return PartialState().is_main_process


def wait() -> None:
    """Wait until all processes have come here."""
    PartialState().wait_for_everyone()


def gathered(items: list[T]) -> list[T]:
    """Return the items of all processes, those of the first process first; all of them have to call it."""
    return gather_object(items) if num_processes() > 1 else items


def highest(number: int) -> int:
    """Return the highest of the numbers of all processes; all of them have to call it."""
    if num_processes() == 1:
        return number
    found = torch.tensor(number, device=PartialState().device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def part(items: Sequence[T], number: int, parts: int) -> Sequence[T]:
    """Return one of several parts of a sequence, in its order, whose sizes differ by at most one."""
    return items[len(items) * number // parts : len(items) * (number + 1) // parts]


def own_batches(items: Sequence[T], size: int) -> Iterator[tuple[Sequence[T], bool]]:
    """Yield this process's part of a sequence in batches, and as many batches as every other process has.

    Where the weights are spread over the processes a pass of the model is a joint work, and none may stay away: a
    process with fewer batches yields the first item again, with False, which says that it does not count.
    """
    count = num_processes()
    own, most = part(items, rank(), count), -(-len(items) // count)  # the ceiling: rows of the largest part
    for start in range(0, most, size):
        batch = own[start : start + size]
        yield (batch, True) if batch else (items[:1], False)


def stand_in(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a micro-batch of the same rows that does not count."""
    return {**inputs, STANDS_IN: True}


def counts(inputs: Mapping[str, Any]) -> bool:
    """Return whether a micro-batch counts, in losses, weights and metrics."""
    return STANDS_IN not in inputs


def stand_in_loss(batch: CompletionBatch) -> Tensor:
    """Return 0, with a graph that gives every trained parameter a gradient of 0."""
    loss = 0.0 * batch.logprobs.sum()
    return loss if batch.values is None else loss + 0.0 * batch.values.sum()


LARGEST = "_max"
"""Ending of the names of metrics of which the largest value is asked for, not the mean."""


class Means:
    """Sums and counts of metrics that come as one value per item, until they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one batch; each tensor holds one value per item, and those without any are left out."""
        for name, given in metrics.items():
            if not given.numel():
                continue
            values = given.detach().double()
            if name.endswith(LARGEST):
                largest = values.max()
                self._sums[name] = torch.maximum(self._sums.get(name, largest), largest)
                self._counts[name] = 1
            else:
                total = values.sum()
                self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + total
                self._counts[name] = self._counts.get(name, 0) + values.numel()

    def take(self) -> dict[str, float]:
        """Return the means of all processes since the last call, and start again; all of them have to call it."""
        own = [(name, total.item(), self._counts[name]) for name, total in self._sums.items()]
        self._sums, self._counts = {}, {}
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for name, total, count in gathered(own):
            if name.endswith(LARGEST):
                sums[name], counts[name] = max(sums.get(name, total), total), 1
            else:
                sums[name], counts[name] = sums.get(name, 0.0) + total, counts.get(name, 0) + count
        return {name: total / counts[name] for name, total in sums.items()}

    def state_dict(self) -> dict[str, list[float]]:
        """Return plain values that :meth:`load_state_dict` takes: sum and count of each metric."""
        return {name: [total.item(), float(self._counts[name])] for name, total in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]], device: torch.device) -> None:
        """Go on from a state."""
        self._sums = {
            name: torch.tensor(total, dtype=torch.double, device=device) for name, (total, _) in state.items()
        }
        self._counts = {name: int(count) for name, (_, count) in state.items()}
