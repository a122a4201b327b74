"""The data layouts in use, each converted to an ``Example``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from falign.choices import shown
from falign.data.column_names import as_mapping, guess_columns
from falign.data.conversations import (
    Message,
    Text,
    common_turns,
    looks_like_hh,
    parsed_conversation,
    read_dialogue,
    read_messages,
    read_text,
)
from falign.data.examples import Example, build_example
from falign.data.files import Row
from falign.data.foreign_formats import FOREIGN, READ_FOREIGN
from falign.data.side_columns import SIDE_COLUMNS
from falign.data.text_values import is_blank, parsed_list
from falign.data.token_weights import WEIGHT_COLUMNS
from falign.errors import DataError

__all__ = ["COLUMNS", "FORMATS", "PAIR", "columns_read", "missing_column"]

COLUMNS: frozenset[str] = frozenset(
    {"prompt", "chosen", "rejected", "system", "completion", "completions", "scores", "ranks", "label"}
    | {"messages", "conversations", "instruction", "input", "history"}
    | {*WEIGHT_COLUMNS, *SIDE_COLUMNS, "margin"}
)
"""The column names that falign reads, in any layout."""

PAIR = ("chosen", "rejected")
"""The columns of a pair."""


def missing_column(row: Row, name: str) -> DataError:
    """Return the error of a row that lacks a column."""
    pair = ("prompt", "chosen", "rejected", "system") if name in PAIR else (name,)
    guesses = guess_columns(row.fields, pair)
    if name not in guesses:
        guesses = {name: "the name in the file", **guesses}
    remedy = f"columns={as_mapping(guesses)}"
    # An empty system column may stand for chat=True.
    columns = sorted(each for each, value in row.fields.items() if each != "system" or not is_blank(value))
    return DataError(f"{row.place}: the column {name!r} is missing; the row has {columns}. Rename it, or set {remedy}.")


def _get(row: Row, name: str) -> Any:
    if name not in row.fields:
        raise missing_column(row, name)
    return row.fields[name]


def _string(row: Row, name: str) -> str:
    value = parsed_conversation(_get(row, name), place=row.place, field=name)
    if not isinstance(value, str):
        raise DataError(f"{row.place}: {name!r} is {shown(value)}; it must be text.")
    return value


def _text(row: Row, name: str) -> Text:
    return read_text(_get(row, name), place=row.place, field=name)


def _system(row: Row) -> str | None:
    if "system" not in row.fields:
        return None
    return "" if row.fields["system"] is None else _string(row, "system")


def _pair(row: Row, prompt: Text, completions: Sequence[Text]) -> Example:
    several = len(completions) > len(PAIR)
    fields = ["chosen", *(f"rejected[{i}]" for i in range(len(completions) - 1))] if several else PAIR
    preference = (1.0, *(0.0 for _ in completions[1:]))
    return build_example(
        row.place, prompt=prompt, completions=completions, preference=preference, fields=fields, system=_system(row)
    )


def _sides(row: Row) -> list[Text]:
    """Return the chosen answer and all rejected ones."""
    rejected = _get(row, "rejected")
    answers = several_answers(rejected)
    if answers is None:
        return [_text(row, name) for name in PAIR]
    if not answers:
        raise DataError(f"{row.place}: 'rejected' is {shown(rejected)}; it must have at least one answer.")
    others = [read_text(each, place=row.place, field=f"rejected[{i}]") for i, each in enumerate(answers)]
    return [_text(row, "chosen"), *others]


def several_answers(value: Any) -> list[Any] | None:
    """Return the answers in a list of texts or of lists of turns; None for a single answer.

    Example:
        >>> several_answers(["a", "b"]), several_answers([{"role": "assistant", "content": "a"}])
        (['a', 'b'], None)
    """
    value = parsed_list(value)
    if not isinstance(value, list):
        return None
    texts = all(isinstance(each, str | list) for each in value)
    return value if texts else None


def _preference(row: Row) -> Example:
    return _pair(row, _text(row, "prompt"), _sides(row))


def _implicit(row: Row) -> Example:
    sides = _sides(row)
    texts = [side for side in sides if isinstance(side, str)]
    if texts and len(texts) < len(sides):
        raise DataError(f"{row.place}: one of 'chosen' and 'rejected' is text, the other a conversation; use one form.")
    if texts:
        prompt = _common_words(texts, row.place)
        return _pair(row, prompt, [text[len(prompt) :] for text in texts])
    return _after_common_turns(row, [side for side in sides if not isinstance(side, str)])


def _common_words(sides: Sequence[str], place: str) -> str:
    if looks_like_hh(sides[0]):
        raise DataError(f"{place}: 'chosen' is a dialogue in HH-RLHF's layout, not one text; set format=hh.")
    # Cut back to before the last white space, so that no word is split and the answer keeps its leading space.
    match = re.match(r"(.*\S)\s", _common_beginning(sides), flags=re.DOTALL)
    if not match:
        raise DataError(
            f"{place}: 'chosen' and 'rejected' have no words in common at their beginning, so there is no prompt; "
            "add a column 'prompt'."
        )
    return match.group(1)


def _common_beginning(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # what these two share, all share
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _after_common_turns(row: Row, sides: Sequence[list[Message]]) -> Example:
    prompt = common_turns(*sides)
    return _pair(row, prompt, [side[len(prompt) :] for side in sides])


def _hh(row: Row) -> Example:
    return _after_common_turns(row, [read_dialogue(_get(row, name), place=row.place, field=name) for name in PAIR])


def _sharegpt(row: Row) -> Example:
    prompt = read_messages(_get(row, "conversations"), place=row.place, field="conversations")
    return _pair(row, prompt, _sides(row))


def _alpaca(row: Row) -> Example:
    question = _string(row, "instruction")
    if not is_blank(row.fields.get("input")):
        question = f"{question}\n{_string(row, 'input')}"
    turns: list[Message] = []
    history = parsed_list(row.fields.get("history"))
    for exchange in [] if is_blank(history) else history if isinstance(history, list) else [history]:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise DataError(f"{row.place}: 'history' has {shown(exchange)}; it must be a list of [question, answer].")
        past = ({"role": role, "content": text} for role, text in zip(("user", "assistant"), exchange, strict=True))
        turns += read_messages(list(past), place=row.place, field="history")
    turns.append({"role": "user", "content": question})
    if "completion" in row.fields and not row.fields.keys() & set(PAIR):
        completion, fields = _text(row, "completion"), ["completion"]
        return build_example(
            row.place, prompt=turns, completions=[completion], preference=None, fields=fields, system=_system(row)
        )
    return _pair(row, turns, _sides(row))


def _ranked(row: Row) -> Example:
    ranks = "ranks" in row.fields
    values = parsed_list(_get(row, "ranks" if ranks else "scores"))
    texts = parsed_list(_get(row, "completions"))
    if not isinstance(texts, list):
        raise DataError(f"{row.place}: 'completions' is {shown(texts)}; it must be a list.")
    numbers = isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or len(values) != len(texts):
        name = "ranks" if ranks else "scores"
        raise DataError(
            f"{row.place}: {name!r} is {shown(values)}; it must be {len(texts)} numbers, one per completion."
        )
    if ranks and not is_blank(row.fields.get("scores")):
        _check_ranks(row, values, parsed_list(row.fields["scores"]))
    fields = [f"completions[{i}]" for i in range(len(texts))]
    completions = [read_text(text, place=row.place, field=field) for text, field in zip(texts, fields, strict=True)]
    return build_example(
        row.place,
        prompt=_text(row, "prompt"),
        completions=completions,
        preference=[-float(value) if ranks else float(value) for value in values],
        fields=fields,
        system=_system(row),
    )


def _check_ranks(row: Row, ranks: list[int | float], scores: Any) -> None:
    # A column of scores in another form may mean something else, so it is not compared.
    if not isinstance(scores, list) or len(scores) != len(ranks) or not all(isinstance(s, int | float) for s in scores):
        return
    # They contradict if some completion has a better (smaller) rank and a lower score than another.
    rated = list(zip(ranks, scores, strict=True))
    if any(rank < other and score < less for rank, score in rated for other, less in rated):
        raise DataError(
            f"{row.place}: 'ranks' ({shown(ranks)}) and 'scores' ({shown(scores)}) disagree on which completion is "
            "better (rank 1 is best, a larger score is better); set ignore=[scores] or ignore=[ranks], or correct one."
        )


def _single(row: Row, preference: tuple[float, ...] | None) -> Example:
    if "messages" in row.fields:
        turns = read_messages(row.fields["messages"], place=row.place, field="messages")
        prompt, completion, field = turns[:-1], turns[-1:], "messages"
    else:
        prompt, completion, field = _text(row, "prompt"), _text(row, "completion"), "completion"
    return build_example(
        row.place, prompt=prompt, completions=[completion], preference=preference, fields=[field], system=_system(row)
    )


def _unpaired(row: Row) -> Example:
    label = _get(row, "label")
    if isinstance(label, str):  # CSV stores every value as text
        label = {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower(), label)
    if label not in (True, False):
        raise DataError(f"{row.place}: 'label' is {shown(label)}; it must be true (desirable) or false.")
    return _single(row, (float(label),))


FORMATS: Mapping[str, Callable[[Row], Example]] = {
    "preference": _preference,
    "implicit": _implicit,
    "hh": _hh,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "ranked": _ranked,
    "unpaired": _unpaired,
    "completion": lambda row: _single(row, None),
    **FOREIGN,
}
"""Readers by layout."""

_READ: Mapping[str, frozenset[str]] = {
    "preference": frozenset({"prompt", *PAIR, "system"}),
    "implicit": frozenset({*PAIR, "system"}),
    "hh": frozenset({*PAIR, "system"}),
    "alpaca": frozenset({"instruction", "input", "history", *PAIR, "system"}),
    "sharegpt": frozenset({"conversations", *PAIR, "system"}),
    "ranked": frozenset({"prompt", "completions", "system"}),
    "unpaired": frozenset({"label", "system"}),
    "completion": frozenset({"system"}),
    **READ_FOREIGN,
}


def columns_read(format: str, row: Row) -> frozenset[str]:
    """Return the columns that a layout reads of a row."""
    own = _READ[format] | {*WEIGHT_COLUMNS, *SIDE_COLUMNS}
    if format == "ranked":
        return own | {"ranks" if "ranks" in row.fields else "scores"}
    if format == "alpaca" and not row.fields.keys() & set(PAIR):
        return own | {"completion"}
    if format in ("unpaired", "completion"):
        return own | ({"messages"} if "messages" in row.fields else {"prompt", "completion"})
    return own
