"""The references of a run by name: built from its run file, rebuilt after the run, and cached."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falign.data.other_prompts import OtherPrompts
from falign.errors import ConfigError, ModelError
from falign.models import base_of, config_hash, describe
from falign.models.heads import cut_head, head_rows
from falign.models.staging import staged_folder
from falign.models.tokenizers import tokenizer_fingerprint
from falign.references import REFERENCE, Cached, CacheKey, Reference
from falign.runfile.config import RunConfig
from falign.runfile.reference_config import BuildContext
from falign.runs.folder import RunFolder
from falign.scoring import PromptTree, Scorer

__all__ = [
    "build_references",
    "cached",
    "fit_references",
    "identities",
    "keep_moved",
    "rebuild_reference",
    "rebuild_references",
]


def build_references(
    config: RunConfig,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device,
    names: Collection[str] | None = None,
    prompts: Mapping[str, OtherPrompts] | None = None,
) -> dict[str, Reference]:
    """Return the references by name, each with the content hash of its weights.

    Args:
        config: The run.
        policy: The policy; each reference that is an adapter is added to it.
        tokenizer: The policy's tokenizer.
        device: The device for references with their own model.
        names: Those to build, besides their members; all by default.
        prompts: The rows' other prompts, for each reference that has a prompt of its own; None without data.

    Raises:
        FalignError: A model or adapter is missing, or does not fit the policy.
    """
    sections, references = config.reference_sections(), dict[str, Reference]()

    def build(name: str) -> Reference:
        if name not in references:
            members = {member: build(member) for member in sections[name].members}
            field, adapter = config.section_of(name), adapter_name(name)
            own = (prompts or {}).get(name)
            context = BuildContext(config, policy, field, adapter, device=device, members=members, prompts=own)
            references[name] = sections[name].build_with_prompt(context)
        return references[name]

    for name in sections:
        if names is None or name in config.with_members(names):
            build(name)
    fit_references(references, policy, tokenizer)
    return references


def adapter_name(reference: str) -> str:
    """Return the name of a reference's adapter in the policy."""
    return "ref" if reference == REFERENCE else f"ref_{reference}"


def fit_references(
    references: Mapping[str, Reference], policy: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that policy and references share their token ids, and cut all heads to the same ids.

    Raises:
        ConfigError: A token has different ids; the message names the first one.
    """
    shared = head_rows(policy)
    for reference in references.values():
        shared = reference.check_fits(tokenizer, shared)
    cut_head(policy, shared)
    # The first pass cut each head to the smallest seen so far; those before the smallest are cut again.
    for reference in references.values():
        reference.check_fits(tokenizer, shared)


def keep_moved(folder: RunFolder, references: Mapping[str, Reference], policy: PreTrainedModel | PeftModel) -> None:
    """Write the last state of moving references into the run folder and its manifest."""
    for name, reference in references.items():
        if reference.moves:
            with staged_folder(folder.reference_state(name), existing="replace") as staging:
                reference.save(staging, policy)
    if any(reference.moves for reference in references.values()):
        folder.write_json("manifest.json", {**folder.read_json("manifest.json"), **identities(references)})


def identities(references: Mapping[str, Reference]) -> dict[str, Any]:
    """Return the manifest's record of the references: the one named ``reference``, and the others by name."""
    found = {name: reference.identity() for name, reference in references.items()}
    own = {REFERENCE: found.pop(REFERENCE, {})}
    return own if not found else {**own, "references": found}


def rebuild_reference(
    config: RunConfig,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
    *,
    device: torch.device,
    name: str = REFERENCE,
) -> Reference:
    """Return a reference of a finished run, in its state at the last step.

    Args:
        config: The run.
        policy: As for :func:`build_references`.
        tokenizer: The policy's tokenizer.
        folder: The run folder.
        device: The device for a reference with its own model.
        name: The name of the reference; by default the one that evaluation compares with.

    Raises:
        ConfigError: The run is not finished, or has no such reference.
        ModelError: The weights or the configuration of the reference have changed since the run.
    """
    return rebuild_references(config, policy, tokenizer, folder, device=device, names=[name])[name]


def rebuild_references(
    config: RunConfig,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
    *,
    device: torch.device,
    names: Collection[str],
) -> dict[str, Reference]:
    """Return several references of a finished run by name, as :func:`rebuild_reference` returns one.

    They are built together, so that all heads are cut to the same token ids.
    """
    sections = config.reference_sections()
    if missing := sorted({*names} - sections.keys()):
        raise ConfigError(f"{folder.path} has no reference named {missing[0]!r}; it has {', '.join(sorted(sections))}.")
    found = build_references(config, policy, tokenizer, device=device, names=names)
    for name, reference in found.items():
        _restore(reference, name, config, policy, folder)
    return found


def _restore(
    reference: Reference, name: str, config: RunConfig, policy: PreTrainedModel | PeftModel, folder: RunFolder
) -> None:
    """Check a reference against the run's manifest, and load the last state of one that moves."""
    field = config.section_of(name)
    manifest, found = folder.read_manifest(), reference.identity()
    recorded = manifest[REFERENCE] if name == REFERENCE else manifest["references"][name]
    # None: the reference has no model of its own, or the run is older than this record.
    if None not in (configs := (recorded.get("config"), found.get("config"))) and configs[0] != configs[1]:
        raise ModelError(
            f"The configuration of the {name} of {folder.path} ({found['kind']}) differs from when the run "
            f"was trained: restore config.json of the models that {folder.run_file} names under model and {field}."
        )
    if reference.moves:
        if not folder.reference_state(name).is_dir():
            raise ConfigError(
                f"{folder.path} has no last state of its moving {name}: finish the run by `falign train ... --resume`."
            )
        reference.load(folder.reference_state(name), policy)
    elif recorded.get("weights") != found.get("weights"):
        raise ModelError(
            f"The {name} of {folder.path} ({found['kind']}) holds other weights now than when the run was trained: "
            f"restore the models that {folder.run_file} names under model and {field}."
        )


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
    top_k: int = 0,
) -> Reference:
    """Compute the reference's log-probabilities of all trees once; return them as a reference that needs no model.

    Args:
        reference: The reference that computes them.
        policy: The policy; some references are computed from its weights.
        tokenizer: Its fingerprint is part of the key.
        trees: All trees that the run will score.
        directory: The cache, which runs may share; each key has its own folder in it.
        batch_size: Trees per batch.
        scorer: A scorer with a layout that the reference's model can read.
        progress: Called with the number of trees done and the total.
        top_k: Number of most likely tokens to keep at each position.

    Raises:
        ConfigError: The reference's identity has no hash of its weights.
    """

    def filled(inner: Reference, rows: Sequence[PromptTree]) -> Cached:
        key = _cache_key(inner, policy, tokenizer, top_k)
        store = directory / key.digest
        cache = Cached(inner, directory=store, key=key)
        cache.precompute(policy, rows, scorer=scorer, batch_size=batch_size, on_progress=progress)
        return Cached(None, directory=store, key=key, origin=inner.identity())

    return reference.with_cache(filled, trees)


def _cache_key(
    reference: Reference, policy: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, top_k: int
) -> CacheKey:
    identity = reference.identity()
    if (weights := identity.get("weights")) is None:
        raise ConfigError(
            f"cache: the reference {identity} has no hash of its weights, so cached values could not be checked "
            "against it: leave the cache out, or add weights to its identity()."
        )
    base = reference.own_model or base_of(policy)
    assert isinstance(base, PreTrainedModel)
    quantization = describe(base).quantization
    return CacheKey(
        weights=weights,
        config=config_hash(base),
        vocabulary=min(head_rows(base), head_rows(policy)),
        tokenizer=tokenizer_fingerprint(tokenizer),
        dtype=f"{base.dtype}{'' if quantization is None else f' {quantization}'}",
        attention=str(base.config._attn_implementation),
        top_k=top_k,
    )
