"""Verification that an exported folder is the trained model."""

import gc
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from falign.errors import ModelError
from falign.models.adapters import load_adapter, transplant_adapter
from falign.models.identity import describe
from falign.models.loading import load_model
from falign.models.new_tokens import add_rows
from falign.models.probe import probe_ids, probe_logits
from falign.models.structure import adapter_matrix, adapter_weights, base_name, base_of, lora_layers
from falign.models.tokenizers import stop_token_ids

__all__ = ["ExportProof", "verify_export"]

# Largest accepted difference, as a share of the largest |logit|. An adapter over the same base does the same
# arithmetic, so it measures 0. A merge adds the rounding of the merged weights; measured on SmolLM2-135M with
# adapters that change logits by 0.6 to 22: 3e-6 (float32), 6e-3 (float16), 5e-2 (bfloat16), the last no more than
# what loading that same base in bfloat16 instead of float32 does to it.
_ADAPTER_BOUND = 1e-5
_MERGE_BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.25e-1}


_LONGEST = 64  # new tokens in the comparison

# The stop tokens are compared separately. The ids of BOS and padding are set by transformers' trainer, which copies
# them from the tokenizer to the model.
_NOT_COMPARED = frozenset(
    {"eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
)


@dataclass(frozen=True)
class ExportProof:
    """The differences between an exported folder and the trained model; logits are compared in float32."""

    kind: Literal["adapter", "merged"]
    dtype: str
    compared_tokens: int
    max_abs_logit: float
    max_abs_logit_difference: float  # exported and trained model, as they are
    max_abs_export_error: float  # without the base's quantization and the rounding to the trained model's type
    max_abs_change_against_base: float
    bound: float  # accepted max_abs_export_error / max_abs_logit

    def table(self) -> list[tuple[str, ...]]:
        """Return a title, and rows of a name and a number, as text."""
        rows: list[tuple[str, ...]] = [
            (f"logits on {self.compared_tokens} tokens, {self.dtype}",),
            ("logit", f"{self.max_abs_logit:.4g}"),
            ("difference from the trained model", f"{self.max_abs_logit_difference:.3g}"),
        ]
        tolerance = f"{self.bound * self.max_abs_logit:.3g}"
        if self.max_abs_export_error == self.max_abs_logit_difference:
            rows.append(("tolerance", tolerance))
        else:
            rows.append(("difference caused by the export", f"{self.max_abs_export_error:.3g}"))
            rows.append(("tolerance of the export", tolerance))
        return [*rows, ("difference from the base model", f"{self.max_abs_change_against_base:.3g}")]


def verify_export(
    trained_model: PreTrainedModel | PeftModel,
    exported_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    kind: Literal["adapter", "merged"],
    probe: Sequence[Sequence[int]] | None = None,
    bound: float | None = None,
    adapter: str = "default",
    base_name_or_path: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_token_ids: Sequence[int] = (),
) -> ExportProof:
    """Load an exported folder as any other program would, and compare its logits with the trained model's.

    An adapter is loaded over the base as it was loaded for training. A merge is compared with the unmerged adapter
    over the base in the dtype of the merge. For QLoRA the trained model itself is too far away to show a lost adapter,
    because of the 4-bit weights (on SmolLM2-135M by 15 of 40 logits, trained or not).

    A merge must also generate as the trained model does: with its stop tokens and generation settings.

    A few sentences contain few tokens, but the comparison covers every token. An adapter on the head changes the logits
    of all tokens, and each position compares all logits. The embeddings of a merge must equal those of its base, row by
    row, but for the rows that the adapter trains, which must equal those. Weights trained without an adapter are
    compared one by one.

    Args:
        trained_model: The model in memory; its mode (training or evaluation) is restored.
        exported_dir: The folder that ``export_adapter`` or ``export_merged`` wrote.
        tokenizer: The tokenizer that was exported.
        kind: The kind of export.
        probe: Token ids of a few sentences; by default ``probe_ids(tokenizer)``.
        bound: Largest accepted error as a share of the largest |logit|; the default depends on kind and dtype.
        adapter: The name of the exported adapter in ``trained_model``.
        base_name_or_path: The model before training, or the one that its adapter was merged into, if that is not the
            one it was loaded from.
        revision: Revision of that base on the hub; for an adapter over the base it was loaded with, the revision in its
            configuration is used instead.
        trust_remote_code: Run code that the base's repository brings along.
        new_token_ids: Tokens that were added to the base before training.

    Raises:
        ModelError: A difference above the bound, a model equal to its base, another chat template, vocabulary, stop
            token or generation setting, or adapter weights that are empty, NaN or infinite, or not LoRA.
    """
    folder = Path(exported_dir)
    _compare_tokenizers(tokenizer, folder)
    if kind == "merged":
        _compare_generation(base_of(trained_model), tokenizer, folder)
    rows = probe_ids(tokenizer) if probe is None else probe
    if new_token_ids:  # which ordinary sentences do not contain
        rows = [*rows, [*new_token_ids][:_LONGEST]]
    trained = probe_logits(trained_model, rows)
    if kind == "adapter":
        comparison = _compare_adapter(trained_model, folder, rows, trained, adapter, trust_remote_code, new_token_ids)
    else:
        source = base_name(trained_model) if base_name_or_path is None else base_name_or_path
        if isinstance(trained_model, PeftModel) and base_name_or_path is None:
            revision = trained_model.peft_config[adapter].revision

        def load_base(dtype: torch.dtype) -> PreTrainedModel:
            base = _load_plain(source, base_of(trained_model), _name(dtype), revision, trust_remote_code)
            add_rows(base, new_token_ids)
            return base

        if isinstance(trained_model, PeftModel):
            comparison = _compare_merged(trained_model, folder, rows, adapter, load_base, trust_remote_code)
        else:
            comparison = _compare_weights(trained_model, folder, rows, trained, load_base, trust_remote_code)
    exported, expected, untrained, dtype = comparison
    proof = ExportProof(
        kind=kind,
        dtype=_name(dtype),
        compared_tokens=len(trained),
        max_abs_logit=_largest(trained),
        max_abs_logit_difference=_largest(exported - trained),
        max_abs_export_error=_largest(exported - expected),
        max_abs_change_against_base=_largest(exported - untrained),
        bound=_default_bound(kind, dtype) if bound is None else bound,
    )
    _judge(proof, folder, trained_model, adapter)
    return proof


class _Comparison(NamedTuple):
    exported: Tensor  # each (tokens, V)
    expected: Tensor
    untrained: Tensor
    dtype: torch.dtype  # the coarsest type involved


def _compare_adapter(
    trained_model: PreTrainedModel | PeftModel,
    folder: Path,
    rows: Sequence[Sequence[int]],
    trained: Tensor,
    adapter: str,
    trust_remote_code: bool,
    new_token_ids: Sequence[int],
) -> _Comparison:
    assert isinstance(trained_model, PeftModel)
    _check_adapter_weights(folder, adapter_weights(trained_model, adapter).keys())
    recorded = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = base_of(trained_model)
    loaded = load_model(
        recorded["base_model_name_or_path"],
        dtype=_name(base.dtype),
        quantization=describe(base).quantization,
        attn_implementation=_attention(base),
        revision=recorded.get("revision"),
        trust_remote_code=trust_remote_code,
        device=base.device,
    )
    add_rows(loaded, new_token_ids)
    adapted = load_adapter(loaded, folder, trainable=False)
    exported = probe_logits(adapted, rows)
    with adapted.disable_adapter():
        untrained = probe_logits(adapted, rows)
    return _Comparison(exported, trained, untrained, base.dtype)


def _compare_merged(
    trained_model: PeftModel,
    folder: Path,
    rows: Sequence[Sequence[int]],
    adapter: str,
    load_base: Callable[[torch.dtype], PreTrainedModel],
    trust_remote_code: bool,
) -> _Comparison:
    base = base_of(trained_model)
    exported, dtype, embeddings = _exported_logits(folder, base, rows, trust_remote_code)
    original = load_base(dtype)
    untrained = probe_logits(original, rows)
    unmerged = transplant_adapter(trained_model, original, adapter=adapter)
    _compare_embeddings(original, embeddings, folder)
    return _Comparison(exported, probe_logits(unmerged, rows), untrained, dtype)


def _compare_weights(
    trained_model: PreTrainedModel,
    folder: Path,
    rows: Sequence[Sequence[int]],
    trained: Tensor,
    load_base: Callable[[torch.dtype], PreTrainedModel],
    trust_remote_code: bool,
) -> _Comparison:
    merged = _load_plain(folder, trained_model, "auto", None, trust_remote_code)
    _compare_parameters(trained_model, merged, folder)
    exported, dtype = probe_logits(merged, rows), merged.dtype
    del merged
    gc.collect()  # one model at a time beside the trained one
    untrained = probe_logits(load_base(dtype), rows)
    return _Comparison(exported, trained, untrained, _coarser(dtype, trained_model.dtype))


def _exported_logits(
    folder: Path, like: PreTrainedModel, rows: Sequence[Sequence[int]], trust_remote_code: bool
) -> tuple[Tensor, torch.dtype, Tensor]:
    merged = _load_plain(folder, like, "auto", None, trust_remote_code)
    logits, dtype, embeddings = probe_logits(merged, rows), merged.dtype, merged.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    del merged
    gc.collect()  # one model at a time beside the trained one
    return logits, dtype, embeddings


def _coarser(*kinds: torch.dtype) -> torch.dtype:
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)


def _judge(proof: ExportProof, folder: Path, trained_model: PreTrainedModel | PeftModel, adapter: str) -> None:
    if proof.max_abs_change_against_base == 0:
        reason = "the export lost the training: export again, in float32 or as an adapter"
        if isinstance(trained_model, PeftModel):
            ups = [adapter_matrix(layer.lora_B, adapter) for layer in lora_layers(trained_model, adapter).values()]
            if not any(bool(up.any()) for up in ups):
                reason = f"all B matrices of adapter {adapter!r} are zero, so it was never trained"
        raise ModelError(f"{folder} gives the same logits as its base: {reason}.")
    differences = [(proof.max_abs_export_error, proof.dtype, proof.bound)]
    base = base_of(trained_model)
    if describe(base).quantization is None:
        # Without quantization only rounding separates the export from the model in memory, so these two are compared as
        # well: the base on disk, which the other comparison uses, may have changed since training.
        coarser = _coarser(base.dtype, getattr(torch, proof.dtype))
        bound = max(proof.bound, _default_bound(proof.kind, coarser))
        differences.append((proof.max_abs_logit_difference, _name(coarser), bound))
    for difference, dtype, bound in differences:
        share = difference / proof.max_abs_logit
        if not share <= bound:  # a NaN must fail too
            raise ModelError(
                f"{folder} is not the trained model: its logits differ by up to {difference:.4g}, {share:.2g} of the "
                f"largest, and rounding to {dtype} explains at most {bound:.2g}. Do not use it; check that the base on "
                "disk is the one that was trained."
            )


def _load_plain(
    source: str | Path, like: PreTrainedModel, dtype: str, revision: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    return load_model(
        source,
        dtype=dtype,
        attn_implementation=_attention(like),
        revision=revision,
        trust_remote_code=trust_remote_code,
        device=like.device,
    )


def _compare_tokenizers(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    exported = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if exported.chat_template != tokenizer.chat_template:
        raise ModelError(
            f"{folder}: its chat template differs from that of the training: export again with that tokenizer."
        )
    if exported.get_vocab() != tokenizer.get_vocab() or exported.eos_token_id != tokenizer.eos_token_id:
        raise ModelError(
            f"{folder}: its tokenizer differs from that of the training: export again with that tokenizer."
        )


def _compare_generation(trained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    exported = GenerationConfig.from_pretrained(folder)
    stops, found = stop_token_ids(trained, tokenizer), exported.eos_token_id
    if not stops <= set([found] if isinstance(found, int) else found or []):
        raise ModelError(
            f"{folder / 'generation_config.json'}: eos_token_id is {found}, and the trained model stops at "
            f"{sorted(stops)}: programs that read it would continue after the end of an answer. Export again."
        )
    settings = [
        {name: value for name, value in config.to_dict().items() if name not in _NOT_COMPARED}
        for config in (trained.generation_config, exported)
        if config is not None
    ]
    for name in sorted(settings[0].keys() | settings[-1].keys()):
        own, written = settings[0].get(name), settings[-1].get(name)
        if own != written:
            raise ModelError(
                f"{folder / 'generation_config.json'}: {name} is {written!r}, and {own!r} in the trained model: export "
                "again."
            )


def _compare_embeddings(original: PreTrainedModel, exported: Tensor, folder: Path) -> None:
    # Under an adapter that trains the embeddings, or rows of them, its own values are read here.
    weight = original.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    weight = weight.detach().to(exported.dtype)
    if weight.shape == exported.shape and torch.equal(weight, exported):
        return
    token = "has another shape"
    if weight.shape == exported.shape:
        token = f"of token {int((weight != exported).any(dim=1).nonzero()[0])} has other values"
    raise ModelError(
        f"{folder} is not the trained model: the embedding {token} than in {original.name_or_path}. Do not use it; "
        "export again."
    )


def _compare_parameters(trained: PreTrainedModel, exported: PreTrainedModel, folder: Path) -> None:
    weights = dict(trained.named_parameters())
    for name, parameter in exported.named_parameters():
        if name not in weights or not torch.equal(weights[name].detach().to(parameter.dtype), parameter):
            raise ModelError(
                f"{folder} is not the trained model: {name} has other values. Do not use it; check that the base on "
                "disk is the one that was trained."
            )


def _check_adapter_weights(folder: Path, trained: Collection[str]) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    if not weights:
        raise ModelError(f"{folder}: its adapter has no weights: export again.")
    if stray := sorted(weights.keys() ^ {*trained}):
        raise ModelError(
            f"{folder}: {stray[0]} is not a weight of the trained adapter, or is missing from the file: export again."
        )
    for name, tensor in weights.items():
        if tensor.numel() == 0 or not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{folder}: {name} of shape {tuple(tensor.shape)} is empty, NaN or infinite: export again."
            )


def _default_bound(kind: str, dtype: torch.dtype) -> float:
    return _ADAPTER_BOUND if kind == "adapter" else _MERGE_BOUNDS[dtype]


def _attention(model: PreTrainedModel) -> str:
    return model.config._attn_implementation or "eager"


def _largest(values: Tensor) -> float:
    return values.abs().max().item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
