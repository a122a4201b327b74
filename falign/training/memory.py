"""Advice at an out-of-memory error: the fields of the run file that save memory, those that change no result first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from falign.errors import TrainingError, one_line
from falign.runfile.config import RunConfig

__all__ = ["advising_on_memory", "memory_advice"]

FULL = ("can't allocate memory", "not enough memory", "out of memory")
"""Parts of messages of allocators, which raise a plain RuntimeError on CPUs."""


@contextmanager
def advising_on_memory(config: RunConfig) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the fields that save memory.

    Args:
        config: The run.

    Raises:
        TrainingError: Memory ran out while the block ran.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(part in str(error).lower() for part in FULL):
            raise
        raise TrainingError(
            f"Out of memory ({one_line(error)}). {'; '.join(memory_advice(config))}. Several can be combined."
        ) from error


def memory_advice(config: RunConfig) -> Iterator[str]:
    """Yield settings that save memory and that a run does not have yet.

    Args:
        config: The run.
    """
    training, online = config.training, config.prompts is not None
    if not training.gradient_checkpointing:
        yield (
            "Set training.gradient_checkpointing=true, which computes activations again instead of keeping them (about "
            "a third more time, the same results)"
        )
    if training.tokens_per_batch is not None:
        yield f"lower training.tokens_per_batch={training.tokens_per_batch}, which takes fewer rows at a time"
    elif training.per_device_train_batch_size > 1:
        half = training.per_device_train_batch_size // 2
        steps = 2 * training.gradient_accumulation_steps
        beside = "" if online else f" with training.gradient_accumulation_steps={steps}"
        yield f"halve the micro-batch: training.per_device_train_batch_size={half}{beside} (the same results)"
    if training.chunk_tokens > 128:
        yield f"lower training.chunk_tokens={training.chunk_tokens}, the positions whose logits are in memory at once"
    if online:
        yield f"lower rollout.max_batch_tokens={config.rollout.max_batch_tokens}, which bounds sampling"
    if config.adapter is None:
        yield "train an adapter, which has no gradients and moments of all weights"
    elif config.model.quantization is None:
        yield "set model.quantization=nf4 or int8, which store weights in a quarter or half of 16 bits"
    length = "prompts.max_length or rollout.max_new_tokens" if online else "data.max_length"
    yield f"shorten rows by {length}"
