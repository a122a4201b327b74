"""Parts of a language model that scoring calls directly: the backbone, without wrappers or head."""

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
    """A model in an adapter wrapper of PEFT, recognized by its methods so that PEFT need not be imported."""

    def get_base_model(self) -> nn.Module:
        """Return the language model inside, with the adapters still in its layers."""
        ...

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Return a context in which the adapters are switched off."""
        ...


def without_wrapper(model: nn.Module) -> nn.Module:
    """Return the language model inside wrappers of adapters and of data parallelism, or the model itself.

    The adapters are inside the layers, so they work without the wrapper and can still be switched off.

    Args:
        model: A causal language model, with or without adapters.

    Returns:
        The model that has the output embeddings.

    Raises:
        ModelError: If the adapter is a learned prompt, which works only through the wrapper.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if not isinstance(model, Adapted):
        return model
    inner = model.get_base_model()
    if inner is getattr(model, "base_model", None):
        raise ModelError(
            f"{type(model).__name__} holds a learned prompt, which would have no effect on scores: use an "
            "adapter inside the layers, such as LoRA."
        )
    return inner


def read_backbone(model: nn.Module) -> nn.Module:
    """Return the module that turns token ids into the last hidden states: the model without its head.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters.

    Returns:
        The module that the model's own forward calls before its head.

    Raises:
        ModelError: If the model has no such module.
    """
    language_model = without_wrapper(model)
    backbone = getattr(language_model, "base_model", language_model)
    if (
        backbone is language_model
    ):  # for text models that keep the prefix of their multimodal variant, such as Llama 4's
        backbone = getattr(language_model, "model", language_model)
    if not isinstance(backbone, nn.Module) or backbone is language_model:
        raise ModelError(
            f"{type(language_model).__name__} has no backbone apart from its head: scoring needs a causal "
            "language model with a `base_model` that returns hidden states."
        )
    return backbone


@contextmanager
def architecture_errors(failure: str, remedy: str) -> Iterator[None]:
    """Turn any error that a model raises into a `ModelError`; architectures fail with many types of errors.

    Args:
        failure: The model and the failed action, as the beginning of the message.
        remedy: The remedy, as the end of the message.

    Raises:
        ModelError: In place of any error except out of memory.
    """
    try:
        yield
    except (MemoryError, ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}".rstrip(".")
        raise ModelError(f"{failure}: {reason}. {remedy}".rstrip()) from error


def other_attention(model: nn.Module) -> str:
    """Return advice to load the model with another attention implementation, if there is one to try.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters.

    Returns:
        A sentence; empty for a model with eager attention.
    """
    attention = getattr(without_wrapper(model).config, "_attn_implementation", None)
    if attention in (None, "eager"):
        return ""
    return f"If its attention ({attention}) is the cause, load the model with attn_implementation: eager."


def run_backbone(model: nn.Module, **inputs: Any) -> Any:
    """Return the backbone's output for the given inputs.

    Under data parallelism (DDP, FSDP2) the whole model is called, because its hooks gather parameters and prepare the
    reduction of gradients. Its head is applied to no position, and a hook captures the backbone's output.

    Args:
        model: A causal language model in the Transformers layout, wrapped or not.
        **inputs: The arguments of its backbone.

    Returns:
        The output, hidden states first.

    Raises:
        ModelError: If the model has no backbone apart from its head.
    """
    backbone = read_backbone(model)
    from torch.distributed.fsdp import FSDPModule  # takes a second to import; reading run files does not need it

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
