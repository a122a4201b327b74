"""Parts of a language model that scoring calls directly: the backbone, without wrappers, and the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from falign.errors import ModelError, one_line

__all__ = [
    "Adapted",
    "Head",
    "architecture_errors",
    "other_attention",
    "read_backbone",
    "read_head",
    "run_backbone",
    "without_wrapper",
]

# Names of these settings in model configurations. `check_head` detects heads that this table does not cover.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)


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
    if inner is getattr(model, "base_model", None):  # no wrapper of layers between: PEFT's prompt learning
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
    if backbone is language_model:
        # Text models with the prefix of their multimodal variant, such as Llama 4's: their base_model is themselves.
        backbone = getattr(language_model, "model", language_model)
    if not isinstance(backbone, nn.Module) or backbone is language_model:
        raise ModelError(
            f"{type(language_model).__name__} has no backbone separate from its head: scoring needs a causal "
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
        ModelError: If the model has no backbone separate from its head.
    """
    backbone = read_backbone(model)
    from torch.distributed.fsdp import FSDPModule  # takes a second to import; reading run files does not need it

    if not isinstance(model, DistributedDataParallel | FSDPModule):
        return backbone(**inputs)
    outputs = []
    hook = backbone.register_forward_hook(lambda module, args, output: outputs.append(output))
    no_positions = torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device)
    try:
        model(**inputs, logits_to_keep=no_positions)
    finally:
        hook.remove()
    return outputs[0]


@dataclass(frozen=True)
class Head:
    """A map from a hidden state to logits: ``c tanh(s E(h) / c)``, or ``s E(h)`` without a cap.

    Attributes:
        embeddings: E, the output embeddings, always called, so that adapters and quantization take effect. A module;
            for a head that is not trained, any function of hidden states.
        scale: s, the factor of the logits.
        softcap: c, the bound of the logits; None for no bound.
    """

    embeddings: nn.Module | Callable[[Tensor], Tensor]
    scale: float = 1.0
    softcap: float | None = None

    @property
    def trains(self) -> bool:
        """True if a parameter of the head requires a gradient."""
        return isinstance(self.embeddings, nn.Module) and any(p.requires_grad for p in self.embeddings.parameters())

    @property
    def matrix(self) -> Float[Tensor, "V H"] | None:
        """E as a constant matrix; None if it is not a plain linear layer (quantized, or with an adapter)."""
        # Exact type: quantized layers and layers with adapters are subclasses or wrappers of nn.Linear.
        layer = self.embeddings
        return layer.weight.detach() if isinstance(layer, nn.Linear) and type(layer) is nn.Linear else None

    def logits(self, raw: Float[Tensor, "M V"]) -> Float[Tensor, "M V"]:
        """Return the logits from the output of the embeddings, in float32 (float64 for a float64 model).

        Args:
            raw: ``E(h)``, shape (M, V).

        Returns:
            Logits over the vocabulary, a new tensor of shape (M, V).
        """
        logits = self.scale * raw.to(torch.promote_types(raw.dtype, torch.float32))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, logits: Float[Tensor, "M V"]) -> Float[Tensor, "M V"] | float:
        """Return the derivative of the logits by the output of the embeddings.

        Args:
            logits: As returned by :meth:`logits`.

        Returns:
            ``s (1 - (z/c)²)``, or ``s`` without a cap.
        """
        return self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap).square())


def read_head(model: nn.Module) -> Head:
    """Read the head of a causal language model from its output embeddings and its configuration.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters.

    Returns:
        Its head. A cap or scale under an unknown name is missed; `check_head` compares the result with the model.

    Raises:
        ModelError: If the model has no output embeddings.
    """
    language_model = without_wrapper(model)
    embeddings = getattr(language_model, "get_output_embeddings", lambda: None)()
    if embeddings is None:
        raise ModelError(
            f"{type(language_model).__name__} has no output embeddings: load it with its language-model head "
            "(AutoModelForCausalLM)."
        )
    whole = language_model.config
    config = getattr(whole, "get_text_config", lambda: whole)()
    multiplies = getattr(config, "model_type", None) in _MULTIPLIES_BY_LOGITS_SCALING
    scale = 1.0
    for name in _MULTIPLIERS + _DIVISORS:
        value = getattr(config, name, None)
        if isinstance(value, float | int):
            scale *= 1.0 / value if name in _DIVISORS and not multiplies else float(value)
    caps = [float(cap) for name in _SOFTCAPS if (cap := getattr(config, name, None))]
    return Head(embeddings=embeddings, scale=scale, softcap=caps[0] if caps else None)
