"""The parts of a language model that scoring calls on their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from falign.errors import ModelError, one_line

__all__ = ["Adapted", "architecture_errors", "other_attention", "read_backbone", "run_backbone", "without_wrapper"]


@runtime_checkable
class Adapted(Protocol):
    """A model in an adapter wrapper of PEFT, told by its methods so that PEFT need not be imported."""

    def get_base_model(self) -> nn.Module:
        """Return the language model inside, its layers still carrying the adapters."""
        ...

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Return a context in which the adapters do not act."""
        ...


def without_wrapper(model: nn.Module) -> nn.Module:
    """Return the language model inside wrappers of adapters and of data parallelism, or the model itself.

    The adapters sit inside the layers, so they act, and can be switched off, without the wrapper.

    Args:
        model: A causal language model, with or without adapters.

    Returns:
        The model that has the output embeddings.

    Raises:
        ModelError: If the adapter is a learned prompt, which acts in the wrapper alone.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if not isinstance(model, Adapted):
        return model
    inner = model.get_base_model()
    if inner is getattr(model, "base_model", None):
        raise ModelError(
            f"{type(model).__name__} holds a learned prompt, which would not act on scores: use an adapter "
            "that lives in the layers, such as LoRA."
        )
    return inner


def read_backbone(model: nn.Module) -> nn.Module:
    """Return the module that turns token ids into the last hidden states: the model less its head.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters.

    Returns:
        The module that the model's own forward calls before its head.

    Raises:
        ModelError: If the model has no such part.
    """
    language_model = without_wrapper(model)
    backbone = getattr(language_model, "base_model", language_model)
    if backbone is language_model:  # where a text model has the prefix of its multimodal one, as Llama 4's has
        backbone = getattr(language_model, "model", language_model)
    if not isinstance(backbone, nn.Module) or backbone is language_model:
        raise ModelError(
            f"{type(language_model).__name__} has no backbone apart from its head: scoring needs a causal "
            "language model whose `base_model` gives hidden states."
        )
    return backbone


@contextmanager
def architecture_errors(failure: str, remedy: str) -> Iterator[None]:
    """Turn whatever a model raises into a `ModelError`; each architecture fails in its own way.

    Args:
        failure: The model, and what it cannot do.
        remedy: The end of the message.

    Raises:
        ModelError: In place of any error but for memory.
    """
    try:
        yield
    except (MemoryError, ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}".rstrip(".")
        raise ModelError(f"{failure}: {reason}. {remedy}".rstrip()) from error


def other_attention(model: nn.Module) -> str:
    """Return the advice to compute attention in another way, where there is one.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters.

    Returns:
        A sentence, or nothing for a model with eager attention.
    """
    attention = getattr(without_wrapper(model).config, "_attn_implementation", None)
    if attention in (None, "eager"):
        return ""
    return f"If its attention ({attention}) is at fault, load the model with attn_implementation: eager."


def run_backbone(model: nn.Module, **inputs: Any) -> Any:
    """Return the backbone's output for some inputs.

    Under data parallelism (DDP, FSDP2) the whole model is called, because its hooks gather parameters and prepare the
    gradients' reduction; its head is given no position to work on, and the backbone's output is caught on the way.

    Args:
        model: A causal language model in the Transformers layout, wrapped or not.
        **inputs: The arguments of its backbone.

    Returns:
        The output, hidden states first.

    Raises:
        ModelError: If the model has no backbone apart from its head.
    """
    backbone = read_backbone(model)
    from torch.distributed.fsdp import FSDPModule  # a second of imports, which run files do without

    if not isinstance(model, DistributedDataParallel | FSDPModule):
        return backbone(**inputs)
    caught = []
    hook = backbone.register_forward_hook(lambda module, args, output: caught.append(output))
    nowhere = torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device)
    try:
        model(**inputs, logits_to_keep=nowhere)
    finally:
        hook.remove()
    return caught[0]
