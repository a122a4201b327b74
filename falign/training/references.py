"""The reference of a run, from its section of the run file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falign.errors import ConfigError, ModelError
from falign.models import (
    adapted_weights_hash,
    base_of,
    config_hash,
    load_adapter,
    load_model,
    model_identity,
    weights_hash,
)
from falign.models.heads import head_rows, share_head
from falign.models.merging import check_plain_lora
from falign.models.soup import cached_checkpoint_soup, soup_record
from falign.models.soup_members import soup_members
from falign.models.sources import adapter_folder
from falign.models.staging import staged_folder
from falign.models.tokenizers import tokenizer_fingerprint
from falign.references import (
    AdapterOff,
    AdapterReference,
    Cached,
    CacheKey,
    FrozenModel,
    MovingAverage,
    MovingReference,
    PeriodicReset,
    Reference,
    Soup,
)
from falign.runfile.config import RunConfig
from falign.runfile.reference_config import (
    AdapterOffConfig,
    AdapterReferenceConfig,
    AutoReferenceConfig,
    FrozenReferenceConfig,
    MovingAverageConfig,
    PeriodicResetConfig,
    ReferenceConfig,
    SoupConfig,
)
from falign.runs.folder import RunFolder
from falign.scoring import PromptTree, Scorer

__all__ = ["build_reference", "cached", "keep_moved", "rebuild_reference", "starts_as_policy"]


def starts_as_policy(config: RunConfig) -> bool:
    """Return whether policy and reference are the same model before the first step."""
    reference, init = _resolved(config), None if config.adapter is None else config.adapter.init
    if isinstance(reference, AdapterReferenceConfig):
        return init is not None and adapter_folder(reference.path).resolve() == adapter_folder(init).resolve()
    if isinstance(reference, FrozenReferenceConfig):
        own = (config.model.path, config.model.dtype, config.model.quantization)
        given = (reference.path, reference.dtype, reference.quantization)
        return init is None and (reference.path is None or given == own)
    if isinstance(reference, AdapterOffConfig):
        return init is None
    return not isinstance(reference, SoupConfig)


def build_reference(config: RunConfig, policy: PreTrainedModel | PeftModel, *, device: torch.device) -> Reference:
    """Return what the policy is held to, with the content hash of its weights.

    Args:
        config: The run.
        policy: It gets a second adapter, ``ref``, where that is the reference.
        device: Where a model of its own is put.

    Raises:
        FalignError: A model or adapter is not there, or does not fit the policy.
    """
    reference, chunk_tokens = _resolved(config), config.training.chunk_tokens
    if isinstance(reference, AdapterOffConfig):
        return AdapterOff(weights=weights_hash(policy), chunk_tokens=chunk_tokens)
    if isinstance(reference, FrozenReferenceConfig):
        return _frozen(config, reference, policy, device)
    if isinstance(reference, AdapterReferenceConfig):
        assert isinstance(policy, PeftModel)
        load_adapter(policy, adapter_folder(reference.path), trainable=False, name="ref")
        check_plain_lora(policy, "ref")  # a fully trained module would be taken for a part of the base
        weights = adapted_weights_hash(policy, adapter="ref")
        return AdapterReference(weights=weights, path=reference.path, chunk_tokens=chunk_tokens)
    if isinstance(reference, SoupConfig):
        return _soup(config, reference, policy, device)
    rule = _rule(reference)
    if not isinstance(policy, PeftModel):
        return MovingReference(_frozen(config, FrozenReferenceConfig(), policy, device), rule=rule)
    weights = adapted_weights_hash(policy, adapter="default")
    return MovingReference.beside(policy, rule=rule, weights=weights, chunk_tokens=chunk_tokens)


def keep_moved(folder: RunFolder, reference: Reference, policy: PreTrainedModel | PeftModel) -> None:
    """Write the last state of a reference that moves into the run folder, and into its record."""
    if not reference.moves:
        return
    with staged_folder(folder.reference, existing="replace") as staging:
        reference.save(staging, policy)
    folder.write_json("manifest.json", {**folder.read_json("manifest.json"), "reference": reference.identity()})


def rebuild_reference(
    config: RunConfig, policy: PreTrainedModel | PeftModel, folder: RunFolder, *, device: torch.device
) -> Reference:
    """Return the reference of a finished run as its last step had it.

    Raises:
        ConfigError: The run is not finished.
        ModelError: What the reference was made of holds other weights now.
    """
    reference = build_reference(config, policy, device=device)
    recorded, found = folder.read_manifest()["reference"], reference.identity()
    if None not in (configs := (recorded.get("config"), found.get("config"))) and configs[0] != configs[1]:
        raise ModelError(
            f"The configuration of the reference of {folder.path} ({found['kind']}) is another now than when the run "
            f"was trained: restore config.json of what {folder.run_file} names under model and reference."
        )
    if reference.moves:
        if not folder.reference.is_dir():
            raise ConfigError(
                f"{folder.path} has not kept where its moving reference came to: finish it by `falign train ... "
                "--resume`."
            )
        reference.load(folder.reference, policy)
        return reference
    if recorded.get("weights") != found["weights"]:
        raise ModelError(
            f"The reference of {folder.path} ({found['kind']}) holds other weights now than when the run was trained: "
            f"restore what {folder.run_file} names under model and reference."
        )
    return reference


def _resolved(config: RunConfig) -> ReferenceConfig:
    """Say what ``auto`` means: what the policy starts from, so that nothing is held to a model it never was."""
    if not isinstance(config.reference, AutoReferenceConfig):
        return config.reference
    if config.adapter is None:
        return FrozenReferenceConfig()
    return AdapterOffConfig() if config.adapter.init is None else AdapterReferenceConfig(path=config.adapter.init)


def _rule(reference: MovingAverageConfig | PeriodicResetConfig | AutoReferenceConfig) -> MovingAverage | PeriodicReset:
    if isinstance(reference, MovingAverageConfig):
        return MovingAverage(alpha=reference.alpha, every=reference.every, rank=reference.rank)
    assert isinstance(reference, PeriodicResetConfig)
    return PeriodicReset(every=reference.every, reset_optimizer=reference.reset_optimizer)


def _frozen(
    config: RunConfig,
    reference: FrozenReferenceConfig,
    policy: PreTrainedModel | PeftModel,
    device: torch.device,
) -> FrozenModel:
    if reference.path is None:
        model = config.model.build()
    else:
        model = load_model(
            reference.path,
            dtype=reference.dtype,
            quantization=reference.quantization,
            attn_implementation=config.model.attn_implementation,
            revision=config.model.revision if reference.path == config.model.path else None,
            trust_remote_code=config.model.trust_remote_code,
        )
    share_head(policy, model)
    identity = model_identity(model)
    model.to(device)  # pyright: ignore[reportArgumentType]
    return FrozenModel(
        model, weights=identity["weights"], config=identity["config"], chunk_tokens=config.training.chunk_tokens
    )


def _soup(config: RunConfig, reference: SoupConfig, policy: PreTrainedModel | PeftModel, device: torch.device) -> Soup:
    members = soup_members(reference.paths, reference.weights)
    if members[0].kind == "checkpoint":
        average = FrozenReferenceConfig(path=str(cached_checkpoint_soup(members)))
        return Soup(_frozen(config, average, policy, device), record=soup_record(members))
    if not isinstance(policy, PeftModel):
        raise ConfigError(
            "reference.kind=soup of adapters with adapter=null: all weights are trained, so the base would move with "
            "the policy; give merged checkpoints (`falign export --format merged`)."
        )
    chunk_tokens = config.training.chunk_tokens
    return Soup.of_adapters(policy, reference.paths, weights=reference.weights, chunk_tokens=chunk_tokens)


def cached(
    reference: Reference,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    trees: Sequence[PromptTree],
    *,
    directory: Path,
    batch_size: int,
    scorer: Scorer,
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
        scorer: Its layout is one that the reference's model can read.
        progress: Called with trees done and in all.
    """
    base = reference.own_model or base_of(policy)
    assert isinstance(base, PreTrainedModel)
    quantization = getattr(base.config, "quantization_config", None)
    key = CacheKey(
        weights=reference.identity()["weights"],
        config=config_hash(base),
        vocabulary=min(head_rows(base), head_rows(policy)),
        tokenizer=tokenizer_fingerprint(tokenizer),
        dtype=f"{base.dtype}{'' if quantization is None else ' nf4'}",
        attention=str(base.config._attn_implementation),
    )
    store = directory / key.digest
    Cached(reference, directory=store, key=key).precompute(
        policy,
        trees,
        scorer=scorer,
        batch_size=batch_size,
        on_progress=progress,
    )
    return Cached(None, directory=store, key=key, origin=reference.identity())
