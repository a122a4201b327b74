"""Exports of trained models for other programs, each compared with the trained model; and soups of models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel

from falign.durable import write_whole
from falign.errors import ConfigError
from falign.models import describe, export_adapter, export_merged, verify_export, write_soup
from falign.models.classifier_export import export_classifier, verify_classifier
from falign.models.gguf_writing import export_gguf, verify_gguf
from falign.models.staging import refuse_other_folder
from falign.runs.loading import Named, OpenRun, check_own_models, each_named, opened
from falign.runs.model_card import check_license, model_card
from falign.runs.publishing import check_account
from falign.runs.publishing import push as upload

if TYPE_CHECKING:
    from falign.models.classifier_export import ClassifierProof
    from falign.models.heads import RewardHead
    from falign.models.proof import ExportProof
    from falign.runfile import RunConfig

__all__ = ["Exported", "SoupMember", "SoupRecord", "export", "soup"]

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Valid values of vLLM's --max-lora-rank."""


class Exported(NamedTuple):
    """An export.

    Attributes:
        path: Its folder.
        proof: Difference between its logits, or rewards, and the trained model's.
        four_bit_base: Whether the trained model has a quantized base and the export its original weights.
        served: How vLLM serves the adapter, or why it cannot; ``""`` for merged weights.
        url: Address of the repository that it was pushed to; ``""`` without.
    """

    path: Path
    proof: ExportProof | ClassifierProof
    four_bit_base: bool
    served: str
    url: str = ""


def export(
    run: str | Path | OpenRun,
    format: str = "merged",
    *,
    out: str | Path | None = None,
    dtype: str = "auto",
    base: str | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    push: str | None = None,
    private: bool = False,
    license: str | None = None,
) -> Exported:
    """Write a trained model, reload it, and compare it with the trained one; an export that differs is removed.

    The folder has a model card, ``README.md``, with the method, the data, the measured figures and how to load it.

    Args:
        run: The run, or its folder.
        format: ``adapter``, in PEFT's layout, ``merged`` weights, ``classifier``, a reward model as a sequence
            classifier of transformers, or ``gguf``, merged weights as a file for llama.cpp.
        out: Target folder; by default ``RUN/export/FORMAT``.
        dtype: Dtype of merged weights; ``auto`` is that of the base checkpoint.
        base: The 16-bit model to merge into, if the run's base is stored quantized.
        overwrite: Replace the target folder.
        trust_code: Whether code that the run folder names may run.
        push: Repository of the Hub to upload the folder to, ``NAME`` or ``OWNER/NAME``; it is created if missing.
        private: Whether a new repository is private.
        license: Identifier of the license for the card; by default that in the card of the base model.

    Raises:
        ConfigError: The arguments contradict each other or the run, the target holds something else, or there is no
            token to push with.
        PublishingError: The Hub refuses the upload, or cannot be reached; the folder stays.
        ModelError: The target is occupied, or the export differs from the trained model.
    """
    if format not in _FORMATS:
        *others, last = _FORMATS
        raise ConfigError(f"format={format!r} is unknown: choose {', '.join(others)} or {last}.")
    for name, value, default in (("base", base, None), ("dtype", dtype, "auto")):
        if format == "adapter" and value != default:
            raise ConfigError(f"{name}={value} applies only to merged weights: give format=merged, or leave it out.")
    if private and push is None:
        raise ConfigError("private applies only to an upload: give push=NAME, or leave it out.")
    given_license, account = check_license(license), None if push is None else check_account(push)
    run = opened(run, trust_code=trust_code)
    target = run.path / "export" / format if out is None else Path(out)
    refuse_other_folder(target, what="an export", sources=_sources(run.config, base))
    _check_head(run.path, format, run.trained.reward_head)
    plan = _Plan(run, target, base, dtype, overwrite)
    write, prove = _FORMATS[format]
    write(plan)
    try:
        proof = prove(plan)
    except BaseException:
        shutil.rmtree(target)  # nobody may use an export that differs from the trained model, or is not proven
        raise
    name = "." if account is None else account.repository
    files = tuple(file.name for file in target.glob("*.gguf"))
    card = model_card(run, format, name=name, files=files, license=given_license)
    write_whole(target / "README.md", str(card))
    url = "" if account is None else upload(target, account, private=private)
    four_bit = format != "adapter" and describe(run.policy).quantization is not None
    return Exported(target, proof, four_bit, _serving(run) if format == "adapter" else "", url)


class _Plan(NamedTuple):
    """An export to make: the run and the arguments of :func:`export`."""

    run: OpenRun
    target: Path
    base: str | None
    dtype: str
    overwrite: bool

    @property
    def _of_base(self) -> dict[str, Any]:
        model = self.run.config.model
        revision = model.revision if self.base is None else None
        tokens = self.run.model_section.new_token_ids()
        return {"revision": revision, "trust_remote_code": model.trust_remote_code, "new_token_ids": tokens}

    @property
    def merging(self) -> dict[str, Any]:
        """Arguments of all functions that write merged weights."""
        return {
            "base_name_or_path": self.base,
            "dtype": self.dtype,
            "overwrite": self.overwrite,
            **self._of_base,
        }

    @property
    def comparing(self) -> dict[str, Any]:
        """Arguments of all functions that compare logits with the trained model's."""
        path = self.run.config.model.path if self.base is None else self.base
        return {"tokenizer": self.run.tokenizer, "base_name_or_path": path, **self._of_base}


def _write_adapter(plan: _Plan) -> None:
    if plan.run.config.adapter is None:
        raise ConfigError(f"{plan.run.path} trained all weights and has no adapter: give format=merged.")
    model: Any = plan.run.policy
    export_adapter(model, plan.run.tokenizer, plan.target, overwrite=plan.overwrite)


def _write_merged(plan: _Plan) -> None:
    export_merged(plan.run.policy, plan.run.tokenizer, plan.target, **plan.merging)


def _write_classifier(plan: _Plan) -> None:
    model, tokenizer, _, head = plan.run.trained
    assert head is not None
    export_classifier(model, head, tokenizer, plan.target, **plan.merging)


def _write_gguf(plan: _Plan) -> None:
    name = plan.run.path.resolve().name
    export_gguf(plan.run.policy, plan.run.tokenizer, plan.target, name=name, **plan.merging)


def _prove_adapter(plan: _Plan) -> ExportProof:
    return verify_export(plan.run.policy, plan.target, kind="adapter", **plan.comparing)


def _prove_merged(plan: _Plan) -> ExportProof:
    return verify_export(plan.run.policy, plan.target, kind="merged", **plan.comparing)


def _prove_classifier(plan: _Plan) -> ClassifierProof:
    model, tokenizer, _, head = plan.run.trained
    assert head is not None
    return verify_classifier(model, head, plan.target, tokenizer=tokenizer)


def _prove_gguf(plan: _Plan) -> ExportProof:
    return verify_gguf(plan.run.policy, plan.target, **plan.comparing)


_FORMATS: dict[str, tuple[Callable[[_Plan], None], Callable[[_Plan], ExportProof | ClassifierProof]]] = {
    "adapter": (_write_adapter, _prove_adapter),
    "merged": (_write_merged, _prove_merged),
    "classifier": (_write_classifier, _prove_classifier),
    "gguf": (_write_gguf, _prove_gguf),
}
"""The function that writes a format, and the one that proves it."""


def _check_head(run: Path, format: str, head: RewardHead | None) -> None:
    """Refuse a format that would leave out the head of a reward model, or needs one."""
    if head is None and format == "classifier":
        raise ConfigError(
            f"format=classifier is of reward models (objective.kind: reward_model), and {run} has trained another "
            "objective: give format=merged or adapter."
        )
    if head is not None and format != "classifier":
        raise ConfigError(f"format={format} has no head, and {run} has trained a reward model: give format=classifier.")


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
