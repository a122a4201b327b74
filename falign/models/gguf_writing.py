"""GGUF files of trained models for llama.cpp, written with the package ``gguf`` and read back by transformers."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_gguf_available

from falign.errors import ModelError
from falign.models.export import existing_rule, merged_model
from falign.models.gguf import read_model, read_tokenizer
from falign.models.probe import probe_ids
from falign.models.proof import ExportProof, verify_export
from falign.models.staging import staged_folder
from falign.models.structure import base_of
from falign.models.tokenizers import stop_token_ids

if TYPE_CHECKING:
    import gguf

__all__ = ["check_gguf", "export_gguf", "pre_tokenizer_name", "verify_gguf"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF's name for each ``model_type`` of transformers that is written."""

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace("{1,3}", "")
_SPLITS = {_LLAMA3_WORDS: "llama-bpe", _QWEN2_WORDS: "qwen2"}


def export_gguf(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    name: str,
    base_name_or_path: str | Path | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_token_ids: Sequence[int] = (),
    overwrite: bool = False,
) -> Path:
    """Write merged weights, tokenizer and chat template as one GGUF file, ``NAME-TYPE.gguf``, in a folder.

    Args:
        model: The trained model; it is not changed.
        tokenizer: The tokenizer it was trained with.
        out_dir: The folder to write; it appears complete or not at all.
        name: Name of the model.
        base_name_or_path: As for :func:`falign.models.export_merged`.
        dtype: Type of the matrices; ``auto`` is that of the base checkpoint. llama.cpp's ``llama-quantize`` makes
            smaller ones.
        revision: The base's revision on the hub.
        trust_remote_code: Run code that the base's repository brings along.
        new_token_ids: Tokens that were added to the base before training.
        overwrite: Replace a folder that is not empty.

    Raises:
        ModelError: As for :func:`check_gguf` and :func:`falign.models.export_merged`.
    """
    check_gguf(base_of(model), tokenizer)
    merged = merged_model(
        model,
        base_name_or_path=base_name_or_path,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        new_token_ids=new_token_ids,
    )
    size = sum(parameter.nbytes for parameter in merged.parameters())
    with staged_folder(Path(out_dir), existing=existing_rule(overwrite), needed_bytes=size) as staging:
        write_gguf(merged, tokenizer, staging / f"{name}-{TYPES[merged.dtype]}.gguf", name=name)
    return Path(out_dir)


def verify_gguf(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    base_name_or_path: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_token_ids: Sequence[int] = (),
) -> ExportProof:
    """Read the GGUF file of a folder with transformers, and compare its tokens and logits with the trained model's.

    Args:
        model: The trained model.
        folder: The exported folder.
        tokenizer: The tokenizer of the training.
        base_name_or_path: As for :func:`falign.models.verify_export`.
        revision: As for :func:`falign.models.verify_export`.
        trust_remote_code: As for :func:`falign.models.verify_export`.
        new_token_ids: As for :func:`falign.models.verify_export`.

    Raises:
        ModelError: Other tokens or another chat template, or a difference above the bound of merged weights.
    """
    (file,) = folder.glob("*.gguf")
    rows = probe_ids(tokenizer)
    own = read_tokenizer(file)
    if probe_ids(own) != rows or own.chat_template != tokenizer.chat_template:
        raise ModelError(f"{file}: its tokens or its chat template differ from those of the training; do not use it.")
    dtype = {name: kind for kind, name in TYPES.items()}[file.stem.rpartition("-")[2]]
    with TemporaryDirectory() as plain:
        reread: Any = read_model(file).to(dtype)  # pyright: ignore[reportArgumentType]
        reread.generation_config = copy.deepcopy(base_of(model).generation_config)
        stops = stop_token_ids(base_of(model), tokenizer)
        reread.generation_config.eos_token_id = sorted(stops)
        reread.save_pretrained(plain)
        tokenizer.save_pretrained(plain)
        del reread
        return verify_export(
            model,
            plain,
            tokenizer=tokenizer,
            kind="merged",
            base_name_or_path=base_name_or_path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            new_token_ids=new_token_ids,
        )


def check_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model or tokenizer that is not written, with the reason and the command that writes it.

    Args:
        model: The model, as loaded.
        tokenizer: Its tokenizer.

    Raises:
        ModelError: The package ``gguf`` is missing, or one of the two is not written.
    """
    if not is_gguf_available():
        raise ModelError("Writing GGUF files needs the package gguf; run `pip install gguf`.")
    if (reason := _why_not(model) or _why_no_tokens(tokenizer)) is not None:
        raise ModelError(
            f"falign does not write this model as GGUF: {reason}. Export merged weights, and convert them with "
            "llama.cpp: `falign export RUN --format merged`, then `python llama.cpp/convert_hf_to_gguf.py "
            "RUN/export/merged --outfile model.gguf --outtype f16`."
        )


def _why_not(model: PreTrainedModel) -> str | None:
    config: Any = model.config
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return f"its architecture is {config.model_type}, and it writes {known}"
    rope = _rope(config)
    if rope.get("rope_type", "default") != "default":
        return f"its positions are scaled ({rope['rope_type']})"
    if config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None:
        return "it has a sliding window"
    if getattr(config, "use_sliding_window", False):
        return "it has a sliding window"
    if config.model_type in ("llama", "mistral") and any(name.endswith("_proj.bias") for name, _ in _weights(model)):
        return "its projections have biases"
    return None


def _why_no_tokens(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return "its tokenizer has no tokenizer.json"
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    if rules["model"]["type"] != "BPE" or rules["model"].get("byte_fallback"):
        return "its tokenizer is not a byte-level BPE"
    if not rules["model"]["merges"]:
        return "its tokenizer has no merges"
    if rules["normalizer"] not in (None, {"type": "NFC"}):
        return f"its tokenizer changes texts first ({rules['normalizer'].get('type')})"
    if pre_tokenizer_name(rules["pre_tokenizer"]) is None:
        return "its tokenizer splits words by a rule that falign does not know the name of"
    return None


def pre_tokenizer_name(rule: Mapping[str, Any] | None) -> str | None:
    """Return llama.cpp's name of the rule by which a tokenizer splits words; None if it is unknown.

    Args:
        rule: ``pre_tokenizer`` of ``tokenizer.json``.
    """
    parts: list[Any] = [] if rule is None else [*rule.get("pretokenizers", [rule])]
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    first, by_words = parts[:-1], parts[-1].get("use_regex", True)
    if not first:
        return "gpt-2" if by_words else None
    if first == [{"type": "Digits", "individual_digits": True}] and by_words:
        return "smollm"
    if len(first) == 1 and first[0].get("type") == "Split" and not by_words:
        return _SPLITS.get(str(first[0]["pattern"].get("Regex")))
    return None


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, name: str) -> None:
    """Write weights, tokenizer and chat template as one GGUF file.

    Matrices keep the model's dtype, and vectors are float32, as llama.cpp reads them.

    Args:
        model: Merged weights on the CPU.
        tokenizer: The tokenizer of the training.
        path: The file.
        name: Name of the model in the file.

    Raises:
        ModelError: As for :func:`check_gguf`; or a weight has no name in GGUF.
    """
    check_gguf(model, tokenizer)
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    try:
        _add_settings(writer, config, model.dtype, name)
        _add_tokens(writer, tokenizer, size=config.vocab_size)
        for stored, array, kind in _tensors(model):
            writer.add_tensor(stored, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_settings(writer: gguf.GGUFWriter, config: Any, dtype: torch.dtype, name: str) -> None:
    import gguf

    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(name)
    writer.add_file_type(
        {
            torch.float32: gguf.LlamaFileType.ALL_F32,
            torch.float16: gguf.LlamaFileType.MOSTLY_F16,
            torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
        }[dtype]
    )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, *, size: int) -> None:
    import gguf

    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {each["id"]: each for each in rules["added_tokens"]}
    by_id = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for id_ in range(size):
        if id_ not in by_id:  # rows of the embeddings that belong to no token
            tokens.append(f"[PAD{id_}]")
            kinds.append(gguf.TokenType.UNUSED)
        else:
            tokens.append(by_id[id_])
            special = id_ in added and added[id_]["special"]
            own = gguf.TokenType.USER_DEFINED if id_ in added else gguf.TokenType.NORMAL
            kinds.append(gguf.TokenType.CONTROL if special else own)
    merges = rules["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(pre_tokenizer_name(rules["pre_tokenizer"])))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    for id_, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if id_ is not None:
            add(id_)  # pyright: ignore[reportArgumentType]
    first = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    writer.add_add_bos_token(first == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Any, Any]]:
    import gguf

    config: Any = model.config
    arch = ARCHITECTURES[config.model_type]
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[arch], config.num_hidden_layers)
    for name, weight in _weights(model):
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ModelError(f"{name} has no name in GGUF's architecture {arch}: export merged weights instead.")
        tensor = weight.detach().cpu()
        if arch == "llama" and (match := re.search(r"\.(q|k)_proj\.weight$", name)):
            heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
            tensor = _interleaved(tensor, heads)
        if tensor.ndim == 1:
            tensor = tensor.float()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type: its bytes are written
            yield stored, tensor.contiguous().view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
        else:
            yield stored, tensor.contiguous().numpy(), None


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return a projection with the two halves of each head interleaved, as llama.cpp's rotary embeddings want it."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight once: a tied head is the embedding."""
    yield from model.named_parameters()


def _rope(config: Any) -> dict[str, Any]:
    found = getattr(config, "rope_parameters", None)
    return dict(found) if isinstance(found, Mapping) else {}
