"""What a run needs to know of a tokenizer besides encoding."""

import hashlib
import json

from transformers import PreTrainedTokenizerBase

__all__ = ["pad_token_id", "tokenizer_fingerprint"]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return what fills rows; `load_tokenizer` has seen to it that there is one."""
    id_ = tokenizer.pad_token_id
    assert isinstance(id_, int)
    return id_


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # slow tokenizers have none
    rules = tokenizer.get_vocab() if backend is None else backend.to_str()
    parts = [rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
