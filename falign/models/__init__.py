"""Models and tokenizers: loading, LoRA adapters, identity, and exports that prove themselves."""

from typing import TYPE_CHECKING

from falign.lazy import lazy_names

if TYPE_CHECKING:
    from falign.models.adapters import add_lora, load_adapter, start_from_adapter, transplant_adapter
    from falign.models.execution import enable_gradient_checkpointing
    from falign.models.export import export_adapter, export_merged
    from falign.models.identity import (
        ModelDescription,
        adapted_weights_hash,
        config_hash,
        describe,
        model_identity,
        weights_hash,
    )
    from falign.models.loading import load_model, load_tokenizer
    from falign.models.probe import probe_ids
    from falign.models.proof import ExportProof, verify_export
    from falign.models.soup import write_soup
    from falign.models.sources import resolve
    from falign.models.structure import base_of
    from falign.models.tokenizers import stop_token_ids
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "falign.models.adapters": ("add_lora", "load_adapter", "start_from_adapter", "transplant_adapter"),
            "falign.models.execution": ("enable_gradient_checkpointing",),
            "falign.models.export": ("export_adapter", "export_merged"),
            "falign.models.identity": (
                "ModelDescription",
                "adapted_weights_hash",
                "config_hash",
                "describe",
                "model_identity",
                "weights_hash",
            ),
            "falign.models.loading": ("load_model", "load_tokenizer"),
            "falign.models.probe": ("probe_ids",),
            "falign.models.proof": ("ExportProof", "verify_export"),
            "falign.models.soup": ("write_soup",),
            "falign.models.sources": ("resolve",),
            "falign.models.structure": ("base_of",),
            "falign.models.tokenizers": ("stop_token_ids",),
        },
    )

__all__ = [
    "ExportProof",
    "ModelDescription",
    "adapted_weights_hash",
    "add_lora",
    "base_of",
    "config_hash",
    "describe",
    "enable_gradient_checkpointing",
    "export_adapter",
    "export_merged",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "model_identity",
    "probe_ids",
    "resolve",
    "start_from_adapter",
    "stop_token_ids",
    "transplant_adapter",
    "verify_export",
    "weights_hash",
    "write_soup",
]
