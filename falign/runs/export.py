"""Exports of trained models for other programs, each compared with the trained model; and soups of models."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel

from falign.errors import ConfigError, FalignError
from falign.models import describe, export_adapter, export_merged, verify_export, write_soup
from falign.models.staging import refuse_other_folder
from falign.runs.loading import Named, OpenRun, check_own_models, each_named, opened

if TYPE_CHECKING:
    from falign.models.proof import ExportProof
    from falign.runfile import RunConfig

__all__ = ["Exported", "SoupMember", "SoupRecord", "export", "soup"]

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Valid values of vLLM's --max-lora-rank."""


class Exported(NamedTuple):
    """An export.

    Attributes:
        path: Its folder.
        proof: Difference between its logits and the trained model's.
        four_bit_base: Whether the trained model has a 4-bit base and the export its original weights.
        served: How vLLM serves the adapter, or why it cannot; ``""`` for merged weights.
    """

    path: Path
    proof: ExportProof
    four_bit_base: bool
    served: str


def export(
    run: str | Path | OpenRun,
    format: str = "merged",
    *,
    out: str | Path | None = None,
    dtype: str = "auto",
    base: str | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
) -> Exported:
    """Write a trained model, reload it, and compare it with the trained one; an export that differs is removed.

    Args:
        run: The run, or its folder.
        format: ``adapter``, in PEFT's layout, or ``merged`` weights.
        out: Target folder; by default ``RUN/export/FORMAT``.
        dtype: Dtype of merged weights; ``auto`` is that of the base checkpoint.
        base: The 16-bit model to merge into, if the run's base is stored in 4 bits.
        overwrite: Replace the target folder.
        trust_code: Whether code that the run folder names may run.

    Raises:
        ConfigError: The arguments contradict each other or the run, or the target holds something else.
        ModelError: The target is occupied, or the export differs from the trained model.
    """
    if format not in ("adapter", "merged"):
        raise ConfigError(f"format={format!r} is unknown: choose adapter or merged.")
    for name, value, default in (("base", base, None), ("dtype", dtype, "auto")):
        if format == "adapter" and value != default:
            raise ConfigError(f"{name}={value} applies only to merged weights: give format=merged, or leave it out.")
    run = opened(run, trust_code=trust_code)
    target = run.path / "export" / format if out is None else Path(out)
    refuse_other_folder(target, what="an export", sources=_sources(run.config, base))
    model, tokenizer, config = run.trained
    revision, trusted = config.model.revision if base is None else None, config.model.trust_remote_code
    if format == "adapter":
        if config.adapter is None:
            raise ConfigError(f"{run.path} trained all weights and has no adapter: give format=merged.")
        export_adapter(model, tokenizer, target, overwrite=overwrite)  # pyright: ignore[reportArgumentType]
    else:
        export_merged(
            model,
            tokenizer,
            target,
            base_name_or_path=base,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trusted,
            overwrite=overwrite,
        )
    try:
        proof = verify_export(
            model,
            target,
            tokenizer=tokenizer,
            kind="adapter" if format == "adapter" else "merged",
            base_name_or_path=config.model.path if base is None else base,
            revision=revision,
            trust_remote_code=trusted,
        )
    except FalignError:
        shutil.rmtree(target)  # nobody may use an export that differs from the trained model
        raise
    four_bit = format == "merged" and describe(model).quantization is not None
    return Exported(target, proof, four_bit, _serving(run) if format == "adapter" else "")


class SoupMember(BaseModel):
    """One of the models that were averaged."""

    path: str
    weight: float
    sha256: str


class SoupRecord(BaseModel):
    """``soup.json`` of an average: its members and their weights."""

    kind: Literal["adapter", "checkpoint"]
    members: tuple[SoupMember, ...]


def soup(
    models: Named | Sequence[Named],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> SoupRecord:
    """Average adapters of one base (exactly) or whole checkpoints, for use as a reference (SALSA) or a model.

    Args:
        models: Adapters, checkpoints, or runs that have trained one.
        out: Target folder.
        weights: One weight for each model, with sum 1; equal weights by default.
        dtype: Dtype of averaged checkpoints; ``auto`` is that of the first.
        overwrite: Replace the target folder.

    Raises:
        ConfigError: The weights do not sum to 1, or the target holds something else.
        ModelError: The models cannot be averaged, or the trained weights of a run are damaged.
    """
    target, paths = Path(out), each_named(models, field="models")
    refuse_other_folder(target, what="a model", sources=paths)
    check_own_models(paths)
    write_soup(paths, target, weights=weights, dtype=dtype, overwrite=overwrite)
    return SoupRecord.model_validate_json((target / "soup.json").read_text(encoding="utf-8"))


def _sources(config: RunConfig, base: str | None) -> Iterator[str | Path]:
    """Return the paths of all models that a run is made from."""
    yield from (path for path in (base, config.model.path, config.adapter and config.adapter.init) if path)
    for part in (*config.reference_sections().values(), *config.rewards):
        yield from part.model_paths()


def _serving(run: OpenRun) -> str:
    from falign.rollouts.vllm_adapters import why_not_servable

    reasons = {rank: why_not_servable(run.policy, max_rank=rank) for rank in VLLM_RANKS}
    if (rank := next((rank for rank, reason in reasons.items() if reason is None), None)) is not None:
        return f"vLLM serves it over the base model with --enable-lora --max-lora-rank {rank}"
    return (
        f"vLLM does not serve it ({reasons[VLLM_RANKS[-1]]}): use merged weights (falign export {run.path} --format "
        "merged)"
    )
