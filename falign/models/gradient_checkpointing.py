"""Gradient checkpointing: activations recomputed in the backward pass instead of kept."""

from peft import PeftModel
from transformers import PreTrainedModel

from falign.models.structure import base_of

__all__ = ["enable_gradient_checkpointing"]


def enable_gradient_checkpointing(model: PreTrainedModel | PeftModel, *, reentrant: bool = False) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them.

    ``reentrant`` is for DeepSpeed ZeRO-3 only; with DDP it marks parameters ready twice. It alone needs inputs that
    require a gradient, which would otherwise extend the graph down to the frozen embeddings for nothing.
    """
    base = base_of(model)
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    if not reentrant:
        base.disable_input_require_grads()
