"""The parts of a language model that scoring calls on their own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import nn

from falign.errors import ModelError

__all__ = ["Adapted", "read_backbone", "without_wrapper"]


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
    """Return the language model inside an adapter wrapper, or the model itself where there is none.

    The adapters sit inside the layers, so they act, and can be switched off, without the wrapper.

    Args:
        model: A causal language model, with or without adapters.

    Returns:
        The model that has the output embeddings.

    Raises:
        ModelError: If the adapter is a learned prompt, which acts in the wrapper alone.
    """
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
    if not isinstance(backbone, nn.Module) or backbone is language_model:
        raise ModelError(
            f"{type(language_model).__name__} has no backbone apart from its head: scoring needs a causal "
            "language model whose `base_model` gives hidden states."
        )
    return backbone
