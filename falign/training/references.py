"""The reference of a run, from its section of the run file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falign.models import base_of, load_model, weights_hash
from falign.models.tokenizers import pad_token_id, tokenizer_fingerprint
from falign.references import AdapterOff, Cached, CacheKey, FrozenModel, Reference
from falign.scoring import Layout, PromptTree
from falign.training.config import RunConfig

__all__ = ["build_reference", "cached", "starts_as_policy"]


def starts_as_policy(config: RunConfig) -> bool:
    """Return whether policy and reference are the same model before the first step."""
    return config.reference.path in (None, config.model.path)


def build_reference(config: RunConfig, policy: PreTrainedModel | PeftModel, *, device: torch.device) -> Reference:
    """Return what the policy is held to, with the content hash of its weights."""
    kind, chunk_tokens = config.reference.kind, config.training.chunk_tokens
    if kind == "adapter_off" or (kind == "auto" and config.adapter is not None):
        return AdapterOff(weights=weights_hash(policy), chunk_tokens=chunk_tokens)
    model = load_model(
        config.reference.path or config.model.path,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        attn_implementation=config.model.attn_implementation,
        revision=config.model.revision if starts_as_policy(config) else None,
        trust_remote_code=config.model.trust_remote_code,
    )
    weights = weights_hash(model)
    return FrozenModel(model.to(device), weights=weights, chunk_tokens=chunk_tokens)  # pyright: ignore[reportArgumentType]


def cached(
    reference: Reference,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    trees: Sequence[PromptTree],
    *,
    directory: Path,
    batch_size: int,
    layout: Layout,
    progress: Callable[[int, int], None],
) -> Cached:
    """Compute the reference's log-probabilities of all trees once, and return them without the reference.

    Args:
        reference: What computes them.
        policy: The model that some references are a part of.
        tokenizer: Its fingerprint is part of the key.
        trees: All that the run will score.
        directory: Shared by runs; each key has a folder of its own in it.
        batch_size: Trees per batch.
        layout: One that the reference's model can read.
        progress: Called with trees done and in all.
    """
    base = reference.model if isinstance(reference, FrozenModel) else base_of(policy)
    assert isinstance(base, PreTrainedModel)
    quantization = getattr(base.config, "quantization_config", None)
    key = CacheKey(
        weights=reference.identity()["weights"],
        tokenizer=tokenizer_fingerprint(tokenizer),
        dtype=f"{base.dtype}{'' if quantization is None else ' nf4'}",
        attention=str(base.config._attn_implementation),
    )
    store = directory / key.digest
    Cached(reference, directory=store, key=key).precompute(
        policy,
        trees,
        pad_token_id=pad_token_id(tokenizer),
        batch_size=batch_size,
        layout=layout,
        on_progress=progress,
    )
    return Cached(None, directory=store, key=key)
