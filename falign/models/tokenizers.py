"""What a run needs to know of a tokenizer besides encoding."""

import hashlib
import json
from datetime import datetime
from functools import partial

from transformers import PreTrainedTokenizerBase

__all__ = ["fix_date", "pad_token_id", "tokenizer_fingerprint"]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return what fills rows: the first of the special tokens, for rows are masked by position, never by value.

    The padding token itself may have been added to the tokenizer alone, and has no row in the embeddings then.
    `load_tokenizer` has seen to it that there is one.
    """
    return min(tokenizer.all_special_ids)


def fix_date(tokenizer: PreTrainedTokenizerBase, date: datetime) -> None:
    """Tell chat templates that write the date another one than the present: the same turns are the same tokens then.

    What is saved of the tokenizer stays as it is.
    """
    # An argument of the template stands before a function of the same name that transformers gives to all templates.
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, strftime_now=date.strftime)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # slow tokenizers have none
    rules = tokenizer.get_vocab() if backend is None else backend.to_str()
    parts = [rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
