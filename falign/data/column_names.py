"""Names of columns: guesses from a name, columns under other names, and columns inside columns."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from falign.choices import shown, similar
from falign.data.files import Row
from falign.data.text_values import is_blank
from falign.errors import DataError

__all__ = [
    "as_list",
    "as_mapping",
    "guess_columns",
    "looks_like_prompt",
    "looks_like_system",
    "renamed",
    "without_turn_keys",
]


_SYSTEM = frozenset({"system", "persona"})
_PROMPT = frozenset({
    "prompt", "prompts", "question", "questions", "query", "queries", "problem", "instruction", "instructions",
    "input", "inputs", "context", "conversation", "conversations", "dialogue", "dialog", "history", "message",
    "messages", "text", "user", "human", "request", "ask", "post", "article", "document", "passage", "chat", "turns",
})  # fmt: skip
_CHOSEN = ("chosen", "accepted", "preferred", "good", "better", "best", "winner", "win", "positive", "pos")
_REJECTED = ("rejected", "dispreferred", "bad", "worse", "worst", "loser", "lose", "negative", "neg")
_COMPLETION = ("completion", "answer", "response", "output", "solution", "reply")
_ANSWER = frozenset({*_CHOSEN, *_REJECTED, "answer", "answers", "response", "responses", "completion", "completions",
                     "output", "outputs", "solution", "reply", "assistant", "gpt", "generation", "generations",
                     "rationale"})  # fmt: skip
_ABOUT = frozenset({
    "id", "ids", "uuid", "hash", "index", "idx", "length", "len", "num", "count", "tokens", "type", "kind", "source",
    "lang", "language", "category", "score", "scores", "rating", "name", "model", "time", "date", "timestamp", "url",
    "label", "labels", "level", "topic", "split",
})  # fmt: skip

_YAML_VALUES = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})


def looks_like_system(name: str) -> bool:
    """Return whether a column's name suggests a system turn.

    Example:
        >>> looks_like_system("system_prompt"), looks_like_system("prompt")
        (True, False)
    """
    words = _words(name)
    return bool(words & _SYSTEM) and not words & (_ANSWER | _ABOUT)


def looks_like_prompt(name: str) -> bool:
    """Return whether a column's name suggests a prompt or a part of a prompt.

    Example:
        >>> [looks_like_prompt(name) for name in ("user_message", "PROMPT", "promt", "prompt_id", "system_prompt")]
        [True, True, True, False, False]
    """
    words = _words(name)
    if words & (_ANSWER | _ABOUT | _SYSTEM):
        return False
    typo = similar(name.lower(), ("prompt", "question", "instruction", "conversation"), cutoff=0.8)
    return bool(words & _PROMPT) or bool(typo)


def guess_columns(fields: Mapping[str, Any], wanted: Collection[str]) -> dict[str, str]:
    """Guess which columns of a row hold what falign reads: falign's name to the file's.

    Args:
        fields: The row.
        wanted: Some of ``prompt``, ``chosen``, ``rejected``, ``system`` and falign's other column names.

    Example:
        >>> row = {"user_message": "q", "answer_good": "a", "answer_bad": "b"}
        >>> guess_columns(row, ("prompt", "chosen", "rejected"))
        {'prompt': 'user_message', 'chosen': 'answer_good', 'rejected': 'answer_bad'}
    """
    free = [name for name, value in fields.items() if name not in wanted and not is_blank(value)]
    guesses: dict[str, str] = {}
    for name in wanted:
        if name in fields:
            continue
        candidates = [column for column in free if column not in guesses.values() and _fits(name, column)]
        if candidates:
            guesses[name] = min(candidates, key=lambda column: _rank(name, column))
    return guesses


def as_mapping(columns: Mapping[str, str]) -> str:
    """Return column names as ``columns`` is written in a run file or on the command line.

    Example:
        >>> as_mapping({"prompt": "question", "chosen": "answer: good"})
        '{prompt: question, chosen: "answer: good"}'
    """
    return "{" + ", ".join(f"{_quoted(name)}: {_quoted(column)}" for name, column in columns.items()) + "}"


def as_list(names: Iterable[str]) -> str:
    """Return column names as ``ignore`` is written in a run file.

    Example:
        >>> as_list(["history", "a, b"])
        '[history, "a, b"]'
    """
    return "[" + ", ".join(map(_quoted, names)) + "]"


def _quoted(name: str) -> str:
    plain = re.fullmatch(r"[^\W\d][\w.-]*( [\w.-]+)*", name) and name.lower() not in _YAML_VALUES
    return name if plain else json.dumps(name, ensure_ascii=False)


def _fits(name: str, column: str) -> bool:
    if name == "prompt":
        return looks_like_prompt(column)
    if name == "system":
        return looks_like_system(column)
    if looks_like_prompt(column) or looks_like_system(column):
        return False
    synonyms = {"chosen": _CHOSEN, "rejected": _REJECTED, "completion": _COMPLETION}.get(name, ())
    words = _words(column)
    opposite = {"chosen": _REJECTED, "rejected": _CHOSEN, "completion": (*_CHOSEN, *_REJECTED)}.get(name, ())
    if words & set(opposite) or words & _ABOUT:
        return False
    return bool(words & set(synonyms)) or similar(name, [column]) is not None


def _rank(name: str, column: str) -> int:
    # Among several candidates, prefer the column with the most common name.
    plain = {"prompt": ("prompt", "question", "query", "instruction", "user", "problem", "messages", "input")}.get(
        name, ()
    )
    words = _words(column)
    return next((rank for rank, word in enumerate(plain) if word in words), len(plain))


def _words(name: str) -> frozenset[str]:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return frozenset(word.lower() for word in re.findall(r"[^\W_]+", spaced))


def renamed(row: Row, columns: Mapping[str, str], *, ignore: Collection[str] = ()) -> Row:
    """Return a row with other column names.

    Args:
        row: The row of the source.
        columns: New name to the row's name; ``outer.inner`` is the entry ``inner`` of the column ``outer``.
        ignore: Columns to leave out, and keys to remove from turns.

    Raises:
        DataError: The row lacks the column, or already has a column with the new name.
    """
    taken = {name: _found(row, name, column) for name, column in columns.items()}
    left_out = {*columns.values(), *ignore}
    for name, value in taken.items():
        lost = row.fields.get(name)
        if name not in left_out and not is_blank(lost) and lost != value:
            raise DataError(
                f"{row.place}: columns={as_mapping({name: columns[name]})} would replace the column {name!r} "
                f"({shown(lost)}), which the row also has; add it to ignore ({as_list([name])}) to leave it out, or to "
                "columns under another name."
            )
    kept = {name: value for name, value in row.fields.items() if name not in left_out}
    fields = kept | taken
    return Row(
        row.place, {name: without_turn_keys(value, ignore) for name, value in fields.items()} if ignore else fields
    )


def without_turn_keys(value: Any, ignore: Collection[str]) -> Any:
    """Return a conversation without some keys of its turns; any other value unchanged."""
    if isinstance(value, Mapping):
        return {name: inner for name, inner in value.items() if name not in ignore}
    if isinstance(value, list):
        return [without_turn_keys(inner, ignore) if isinstance(inner, Mapping | list) else inner for inner in value]
    return value


def _found(row: Row, name: str, column: str) -> Any:
    if column in row.fields:
        return row.fields[column]
    value: Any = row.fields
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise DataError(
                f"{row.place}: columns={as_mapping({name: column})} names a column that is missing; "
                f"the row has {sorted(row.fields)}."
            )
        value = value[part]
    return value
