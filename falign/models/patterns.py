"""Trial of regular expressions from files, in a child process with a deadline, because some take exponential time."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from falign.deadlines import failure
from falign.errors import ModelError

__all__ = ["DEADLINE", "check_adapter_patterns", "check_tokenizer_patterns"]

DEADLINE = 20.0
"""Seconds that all patterns of a file may take together; normal ones take milliseconds."""

_PLAIN = re.compile(r"[\w.\-]*")
# Nested repetitions, or a choice in a repetition, can take time exponential in the length of the text.
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{\d*,\d*\})")
_LENGTH = 48  # long enough that exponential time shows, short enough that polynomial time does not


def check_adapter_patterns(config: Mapping[str, Any], names: Sequence[str], *, file: Path) -> None:
    """Refuse patterns of an adapter that do not match a model's module names within the deadline.

    Args:
        config: The content of ``adapter_config.json``.
        names: The modules of the model.
        file: That file, for messages.

    Raises:
        ModelError: A pattern that takes too long, or is invalid.
    """
    for field in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = config.get(field)
        given = [value] if isinstance(value, str) else list(value) if isinstance(value, dict) else []
        patterns = [each for each in given if isinstance(each, str) and not _PLAIN.fullmatch(each)]
        if not patterns:
            continue
        if (problem := failure(_match, patterns, names, seconds=DEADLINE)) is not None:
            raise ModelError(
                f"{file}: {field} has the pattern {_short(patterns[0])}, which {problem} on the names of this model's "
                "modules: name the modules in a list."
            )


def check_tokenizer_patterns(tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
    """Refuse a tokenizer with patterns that take exponential time; only patterns with a repeated group are tested.

    Args:
        tokenizer: The tokenizer.
        name: Its name in messages.

    Raises:
        ModelError: Names the pattern.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # slow tokenizers have none
    if backend is None:
        return
    parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    rules = {part: json.loads(each.__getstate__()) for part, each in parts.items() if each is not None}
    for pattern in _patterns(rules):
        if not _REPEATED_GROUP.search(pattern):
            continue
        # A minimal tokenizer with only the rules that contain patterns, so that nothing else takes time.
        whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None}
        whole |= {"decoder": None, "model": {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}}
        whole |= {"normalizer": rules.get("normalizer"), "pre_tokenizer": rules.get("pre_tokenizer")}
        if (problem := failure(_encode, whole, _texts(pattern), seconds=DEADLINE)) is not None:
            raise ModelError(
                f"The tokenizer of {name} has the pattern {_short(pattern)}, which {problem} on texts of {_LENGTH} "
                "characters: write it in its tokenizer.json without a repetition inside a repetition, or use another "
                "tokenizer."
            )


def _patterns(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "Regex" and isinstance(each, str):
                yield each
            else:
                yield from _patterns(each)
    elif isinstance(value, list):
        for each in value:
            yield from _patterns(each)


def _texts(pattern: str) -> list[str]:
    """Return texts that almost match: long repetitions with another character at the end."""
    alone = [each for each in pattern if each.isalnum()]
    pieces = dict.fromkeys([*"aA0 \n!é", *re.findall(r"[^\W_]+", pattern), *alone])
    # The engine first searches for a literal that the pattern must end with. So the text contains it, in a wrong place.
    ends = ("", "!", "a", "\n", f"! {''.join(alone)}")
    return [(piece * _LENGTH)[:_LENGTH] + end for piece in pieces for end in ends]


def _match(patterns: Sequence[str], texts: Sequence[str]) -> None:
    for pattern in patterns:
        compiled = re.compile(pattern)
        for text in texts:
            compiled.fullmatch(text)


def _encode(rules: Any, texts: Sequence[str]) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    for text in texts:
        tokenizer.encode(text)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 200 else pattern[:200] + " ...")
