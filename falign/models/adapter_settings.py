"""Checks of an adapter's settings: whether its base stays intact, and whether it is plain LoRA."""

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["BEYOND_PLAIN_LORA", "base_change", "beyond_plain_lora"]

BEYOND_PLAIN_LORA = {
    "use_dora": "is DoRA",
    "lora_bias": "has biases",
    "modules_to_save": "has fully trained modules (modules_to_save)",
    "alora_invocation_tokens": "acts only after an invocation (alora_invocation_tokens)",
    "layer_replication": "repeats layers (layer_replication)",
    "trainable_token_indices": "has trained tokens (trainable_token_indices)",
    "target_parameters": "acts on parameters such as experts (target_parameters)",
    "use_qalora": "is QALoRA",
    "use_bdlora": "has block-diagonal matrices (use_bdlora)",
    "arrow_config": "routes between adapters (arrow_config)",
    "kasa_config": "is KaSA",
    "velora_config": "is VeLoRA",
    "monteclora_config": "is MonteCLoRA",
}
"""Settings of PEFT's LoRA that make an adapter more than one pair of matrices per linear layer, with descriptions."""

# They initialize A and B and leave the base unchanged. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract the start
# ``s B₀ A₀`` from the base's weights, and PEFT does so again whenever such an adapter is added to a model.
_HARMLESS_STARTS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


def base_change(settings: Mapping[str, Any]) -> str | None:
    """Describe how an adapter changes the base's weights when it is added to a model; None if it does not.

    Args:
        settings: The content of ``adapter_config.json``, or ``vars`` of PEFT's configuration.
    """
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _HARMLESS_STARTS:
        return f"init_lora_weights={start!r} subtracts the adapter's start from the base's weights"
    if (bias := settings.get("bias", "none")) != "none":
        return f"bias={bias!r} replaces the base's own biases"
    if settings.get("layer_replication"):
        return "layer_replication repeats layers of the base"
    return None


def beyond_plain_lora(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield each reason why an adapter is more than pairs of matrices on linear layers over an intact base."""
    yield from (what for field, what in BEYOND_PLAIN_LORA.items() if settings.get(field))
    if (change := base_change(settings)) is not None:
        yield f"changes its base ({change})"
