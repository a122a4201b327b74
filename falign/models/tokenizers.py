"""What a run needs to know of a tokenizer besides encoding."""

import hashlib
import json
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

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
    codes = {code: date.strftime(code) for letter in _DATE_CODES for code in (f"%{letter}", f"%-{letter}")}
    macro = _STRFTIME_NOW.replace("CODES", json.dumps(list(codes.items())))
    tokenizer.get_chat_template = partial(_with_date, tokenizer.get_chat_template, macro)


_DATE_CODES = "aAbBcdDeFGhHIjklmMpPrRsSTuUVwWxXyYzZ"

# transformers hands plain values alone to templates, so that the function is written in the template's own language.
# It stands on the first line, and lets the text after it be as it was.
_STRFTIME_NOW = (
    "{%- macro strftime_now(format) -%}{%- set written = namespace(text=format.replace('%%', '\\0')) -%}"
    "{%- for code, value in CODES -%}{%- set written.text = written.text.replace(code, value) -%}{%- endfor -%}"
    "{{- written.text.replace('\\0', '%') -}}{%- endmacro -%}{{ '' }}"
)


def _with_date(get_chat_template: Callable[..., str], macro: str, *args: Any, **kwargs: Any) -> str:
    template = get_chat_template(*args, **kwargs)
    return f"{macro}{template}" if "strftime_now" in template else template


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # slow tokenizers have none
    rules = tokenizer.get_vocab() if backend is None else backend.to_str()
    parts = [rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
