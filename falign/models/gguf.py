"""GGUF files, dequantized once and cached as plain checkpoints that any other tool can open."""

import hashlib
import os
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.import_utils import is_gguf_available

from falign.errors import ModelError
from falign.models.kept_folder import kept_folder

__all__ = ["cache_folder", "plain_checkpoint", "read_model", "read_tokenizer"]

_CONVERSION = b"2"  # part of the cache name: raise it when the conversion below changes what it writes

# Tokenizers that split off single digits before the byte-level split. transformers omits that split in its conversion,
# which changes the tokens of "\n\n1", or of two spaces before a digit.
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva"})


def cache_folder() -> Path:
    """Return the folder of converted models: ``$FALIGN_CACHE``, else ``falign/models`` in the user's cache."""
    own = os.environ.get("FALIGN_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "falign" / "models"


def plain_checkpoint(gguf_path: Path) -> Path:
    """Return a folder with the float32 weights, tokenizer and chat template of a GGUF file.

    The first call writes the folder; its name contains a hash of the file's content.

    Raises:
        ModelError: The file does not exist or is not a GGUF file, the package ``gguf`` is missing, or the folder that
            was found has other content than was written.
    """
    if not gguf_path.is_file():
        raise ModelError(f"{gguf_path} does not exist: give the path of a .gguf file.")
    folder = cache_folder() / f"{gguf_path.stem}-{_content_hash(gguf_path)[:12]}"

    def write(staging: Path) -> None:
        if not is_gguf_available():
            raise ModelError(f"{gguf_path}: reading GGUF files needs the package gguf; run `pip install gguf`.")
        read_model(gguf_path).save_pretrained(staging)
        read_tokenizer(gguf_path).save_pretrained(staging)

    # 4 bytes per weight in place of about 4.5 bits.
    return kept_folder(folder, write, needed_bytes=7 * gguf_path.stat().st_size)


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256(_CONVERSION)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file (it does not begin with 'GGUF'): download it again.")
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_model(path: Path) -> PreTrainedModel:
    """Return the model of a GGUF file, in float32."""
    # `dequantize=True` also removes the quantization from the configuration, which would otherwise be wrong.
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a GGUF file, with the rules that transformers leaves out."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"{path}: its tokenizer has no conversion; use the model's original checkpoint.")
    if _pre_tokenizer_name(path) in _SINGLE_DIGITS:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    return tokenizer


def _pre_tokenizer_name(path: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())
