"""The head of a language model: from a hidden state to logits over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.errors import ModelError
from falign.scoring.backbone import without_wrapper

__all__ = ["Head", "read_head"]

# Names of these settings in model configurations. `check_head` detects heads that this table does not cover.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)


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
