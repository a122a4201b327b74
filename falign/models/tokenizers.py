"""Padding, stop tokens, dates and identity of tokenizers, and whether models share token ids."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from falign.errors import ConfigError, ModelError
from falign.models.sources import resolve

__all__ = [
    "check_same_tokens",
    "check_token_rows",
    "fix_date",
    "fix_options",
    "pad_token_id",
    "stop_token_ids",
    "tokenizer_fingerprint",
]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id for padding: the first special token. Rows are masked by position, never by value.

    The padding token itself may exist only in the tokenizer, without a row in the embeddings.
    `load_tokenizer` makes sure that there is a special token.
    """
    return min(tokenizer.all_special_ids)


def fix_date(tokenizer: PreTrainedTokenizerBase, date: datetime) -> None:
    """Fix the date that chat templates write, so that the same turns give the same tokens on every day.

    The tokenizer's files do not change.
    """
    # All codes of strftime are formatted here; the macro below only replaces them in the template's format string.
    codes = {code: date.strftime(code) for letter in _DATE_CODES for code in (f"%{letter}", f"%-{letter}")}
    macro = _STRFTIME_NOW.replace("CODES", json.dumps(list(codes.items())))
    tokenizer.get_chat_template = partial(_with_date, tokenizer.get_chat_template, macro)
    tokenizer.template_date = date


def fix_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """Give the chat template further variables in every call; those of a call take precedence.

    The tokenizer's files do not change.
    """
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **options)
    tokenizer.template_options = dict(options)


_DATE_CODES = "aAbBcdDeFGhHIjklmMpPrRsSTuUVwWxXyYzZ"

# transformers passes only plain values to templates, so the function is written in the template's own language. It
# stands on the first line, so that line numbers stay as they were.
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


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, models: str) -> None:
    """Refuse two tokenizers that give one token two ids.

    The other one may have more tokens. Padding tokens are not compared, because no model reads them.

    Args:
        tokenizer: The policy's tokenizer.
        other: The other model's tokenizer.
        models: Names of both models, for messages.

    Raises:
        ConfigError: A token has different ids; the message names the first one.
    """
    ids, other_ids = tokenizer.get_vocab(), other.get_vocab()
    ids = {token: id_ for token, id_ in ids.items() if token != tokenizer.pad_token or token == tokenizer.eos_token}
    token = next((token for token in sorted(ids, key=ids.__getitem__) if other_ids.get(token) != ids[token]), None)
    if token is not None:
        raise ConfigError(
            f"{models} have different tokens: {token!r} has the id {ids[token]} in the first and "
            f"{other_ids.get(token, 'none')} in the second. Give models with the same tokenizer."
        )


def check_token_rows(
    rows: Iterable[tuple[str, Sequence[int]]],
    *,
    num_rows: int,
    model: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Refuse token ids without a row in the model's embeddings.

    Args:
        rows: Token ids, each with its place.
        num_rows: Number of rows of the embeddings.
        model: The name of the model in messages.
        tokenizer: The tokenizer of the ids, if available, for messages.

    Raises:
        ModelError: A token has no row; the message names the first one.
    """
    for place, ids in rows:
        largest = max(ids, default=0)
        if largest >= num_rows:
            id_ = next(each for each in ids if each >= num_rows)
            name = "a token" if tokenizer is None else f"token {tokenizer.convert_ids_to_tokens(id_)!r}"
            raise ModelError(
                f"{place}: {name} has the id {id_}, and {model} has "
                f"{num_rows} rows in its embeddings: the tokenizer has tokens that the model lacks. Load the model, "
                "call `model.resize_token_embeddings(len(tokenizer))`, save it, and train that; or use the tokenizer "
                "of that model."
            )


def stop_token_ids(
    source: PreTrainedModel | GenerationConfig | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    revision: str | None = None,
) -> frozenset[int]:
    """Return the ids that end a completion: those of the generation config, and the tokenizer's EOS.

    Args:
        source: A model, its generation config, or a model name; of a name only ``generation_config.json`` is read.
        tokenizer: The model's tokenizer.
        revision: Branch, tag or commit on the hub, if ``source`` is a name.
    """
    if isinstance(source, str | Path):
        config = _generation_config(resolve(source), revision)
    else:
        config = source.generation_config if isinstance(source, PreTrainedModel) else source
    ids = None if config is None else config.eos_token_id
    stops = [ids] if isinstance(ids, int) else list(ids or ())
    return frozenset(id_ for id_ in (*stops, tokenizer.eos_token_id) if isinstance(id_, int))


def _generation_config(name: str, revision: str | None) -> GenerationConfig | None:
    folder = Path(name)
    if folder.is_dir() and not (folder / "generation_config.json").is_file():
        return None  # older checkpoints have none; the tokenizer's EOS is then the only stop token
    try:
        return GenerationConfig.from_pretrained(name, revision=revision or "main")
    except OSError:  # the tokenizer was loaded from there, so the model exists without this file
        return None
