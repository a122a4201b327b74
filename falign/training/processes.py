"""The processes of a run: each computes its share, and one of them, the writer, writes the run folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from falign.errors import ConfigError
from falign.objectives import CompletionBatch

__all__ = [
    "STANDS_IN",
    "Means",
    "average_gradients",
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
"""Environment variable: whether weights are sharded over the processes (FSDP2)."""

STANDS_IN = "stands_in"
"""The field that marks a micro-batch which does not count, computed by a process that has one batch less than others.

If processes exchange gradients or weights, they must run every pass of the model together: a process that left one out
would make the others wait forever.
"""


def join() -> None:
    """Join the processes of a launch, as its environment variables say; without them, this process is the only one."""
    on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # without a device, Accelerate would assume a single process
    if os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError("ZeRO (DeepSpeed) is not supported: take configs/accelerate/fsdp2.yaml, or ddp.yaml.")
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError("FSDP is supported only in version 2: set fsdp_config.fsdp_version=2.")
        # falign shards models itself: Accelerate would do it too late, after hashes and probes, and not on CPUs.
        os.environ[SHARDS] = "true"
    PartialState(cpu=on_cpu)


def shards() -> bool:
    """Return whether weights are sharded over the processes (FSDP2); otherwise each process has all of them."""
    return num_processes() > 1 and os.environ.get(SHARDS) == "true"


def num_processes() -> int:
    """Return the number of processes of the run."""
    return PartialState().num_processes


def rank() -> int:
    """Return the number of this process, from 0."""
    return PartialState().process_index


def is_writer() -> bool:
    """Return whether this is the process that writes the run folder and talks to the user."""
    return PartialState().is_main_process


def wait() -> None:
    """Wait until all processes have reached this call."""
    PartialState().wait_for_everyone()


def gathered(items: list[T]) -> list[T]:
    """Return the items of all processes, in the order of processes; all processes must call it."""
    return gather_object(items) if num_processes() > 1 else items


def highest(number: int) -> int:
    """Return the largest number of any process; all processes must call it."""
    if num_processes() == 1:
        return number
    found = torch.tensor(number, device=PartialState().device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def part(items: Sequence[T], number: int, parts: int) -> Sequence[T]:
    """Return one of several consecutive parts of a sequence; their sizes differ by at most one."""
    return items[len(items) * number // parts : len(items) * (number + 1) // parts]


def own_batches(items: Sequence[T], size: int) -> Iterator[tuple[Sequence[T], bool]]:
    """Yield the batches of this process's part of a sequence, each with True; all processes yield the same number.

    Processes must run the model together if its weights are sharded. A process that has fewer batches than others
    yields the first item again, with False: its result does not count.
    """
    count = num_processes()
    own, most = part(items, rank(), count), -(-len(items) // count)  # rounded up: the size of the largest part
    for start in range(0, most, size):
        batch = own[start : start + size]
        yield (batch, True) if batch else (items[:1], False)


def stand_in(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the micro-batch, marked as one that does not count."""
    return {**inputs, STANDS_IN: True}


def counts(inputs: Mapping[str, Any]) -> bool:
    """Return whether a micro-batch counts in losses, weights and metrics."""
    return STANDS_IN not in inputs


def stand_in_loss(batch: CompletionBatch) -> Tensor:
    """Return 0, connected to every trained parameter, so that the reduction of gradients includes this process."""
    loss = 0.0 * batch.logprobs.sum()
    for values in (batch.values, batch.second_values):
        loss = loss if values is None else loss + 0.0 * values.sum()
    return loss


LARGEST = ("_max", "sampling/sampling_logp_difference/max")
SMALLEST = ("clip_ratio/low_min",)
"""Ends of the names of metrics that are logged as their largest or smallest value, not their mean."""


def _extreme(name: str) -> Callable[[Any, Any], Any] | None:
    """Return the function that a metric of this name takes of two values; None if it is a mean."""
    return max if name.endswith(LARGEST) else min if name.endswith(SMALLEST) else None


class Means:
    """Running means of metrics, exact over batches and processes, because each metric has one value per item."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the metrics of one batch, each with one value per item; empty ones are ignored."""
        for name, given in metrics.items():
            if not given.numel():
                continue
            values = given.detach().double()
            if (extreme := _extreme(name)) is not None:
                found = values.max() if extreme is max else values.min()
                self._sums[name] = extreme(self._sums.get(name, found), found)
                self._counts[name] = 1
            else:
                total = values.sum()
                self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + total
                self._counts[name] = self._counts.get(name, 0) + values.numel()

    def take(self) -> dict[str, float]:
        """Return the means over all processes since the last call, and reset them; all processes must call it."""
        means = self.now()
        self._sums, self._counts = {}, {}
        return means

    def now(self) -> dict[str, float]:
        """Return the means over all processes since they were last taken; all processes must call it."""
        own = [(name, total.item(), self._counts[name]) for name, total in self._sums.items()]
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for name, total, count in gathered(own):
            if (extreme := _extreme(name)) is not None:
                sums[name], counts[name] = extreme(sums.get(name, total), total), 1
            else:
                sums[name], counts[name] = sums.get(name, 0.0) + total, counts.get(name, 0) + count
        return {name: total / counts[name] for name, total in sums.items()}

    def state_dict(self) -> dict[str, list[float]]:
        """Return sum and count of each metric as plain values."""
        return {name: [total.item(), float(self._counts[name])] for name, total in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]], device: torch.device) -> None:
        """Restore sums and counts."""
        self._sums = {
            name: torch.tensor(total, dtype=torch.double, device=device) for name, (total, _) in state.items()
        }
        self._counts = {name: int(count) for name, (_, count) in state.items()}


def average_gradients(head: nn.Module) -> None:
    """Average the gradients of a head over processes from now on; DDP averages only those of the model that it wraps.

    Args:
        head: A module outside of the policy, the same in all processes.
    """
    for parameter in (each for each in head.parameters() if each.requires_grad):
        parameter.register_post_accumulate_grad_hook(_average)


def _average(parameter: Tensor) -> None:
    """Average an accumulated gradient over processes; parts that were averaged before stay as they are."""
    assert parameter.grad is not None
    torch.distributed.all_reduce(parameter.grad)
    parameter.grad /= num_processes()
