"""Weights of tokens from a column of the data: given for parts of an answer's text, and aligned to its tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from falign.choices import shown
from falign.data.chat_template import Tokenizer
from falign.data.conversations import Text
from falign.data.text_values import parsed_list
from falign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from falign.data.files import Row  # which imports the layouts, which import this

__all__ = ["WEIGHT_COLUMNS", "answer_text", "character_weights", "token_weights", "weights_in"]

WEIGHT_COLUMNS = ("chosen_weights", "rejected_weights", "completion_weights", "completions_weights")
"""Columns of weights: of the two sides of a pair, of a single completion, and of each entry of ``completions``."""

_FORM = 'a list of {"text", "weight"} that together are the answer, or of {"start", "end", "weight"} in characters'


def answer_text(completion: Text) -> str:
    """Return the text of a completion without what a template adds."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def weights_in(row: Row, completions: Sequence[Text]) -> tuple[tuple[float, ...], ...] | None:
    """Return the weight of each character of each completion, from the weight columns of a row.

    Args:
        row: The row, under falign's column names.
        completions: Its completions.

    Returns:
        One tuple per completion, one number per character of its text; None if the row has no weight column.

    Raises:
        DataError: The columns do not fit the row, or a value does not fit its answer.
    """
    present = [name for name in WEIGHT_COLUMNS if row.fields.get(name) is not None]
    if not present:
        return None
    if any(not isinstance(completion, str) and len(completion) > 1 for completion in completions):
        raise DataError(
            f"{row.place}: {present[0]!r} for answers of several turns; weights of tokens are those of one answer: "
            f"give answers of one turn, or set ignore=[{', '.join(present)}]."
        )
    if "chosen" in row.fields and "rejected" in row.fields:
        wanted = ("chosen_weights", "rejected_weights")
        values = [row.fields.get(name) for name in wanted]
    elif "completions" in row.fields:
        wanted = ("completions_weights",)
        entries = parsed_list(row.fields.get(wanted[0]))
        if not isinstance(entries, list) or len(entries) != len(completions):
            raise DataError(
                f"{row.place}: {wanted[0]!r} is {shown(entries)}; it must be {len(completions)} entries, one for each "
                "completion."
            )
        values = entries
    else:
        wanted = ("completion_weights",)
        values = [row.fields.get(wanted[0])]
    if wrong := [name for name in present if name not in wanted]:
        raise DataError(f"{row.place}: {wrong[0]!r} in a row of another form, which has {', '.join(wanted)}.")
    names = wanted if len(wanted) > 1 else [f"{wanted[0]}[{i}]" for i in range(len(values))]
    found = []
    for name, value, completion in zip(names, values, completions, strict=True):
        if value is None:
            raise DataError(f"{row.place}: {name!r} is missing beside {present[0]!r}; give [] for weights of 1.")
        found.append(character_weights(parsed_list(value), answer_text(completion), place=f"{row.place}: {name!r}"))
    return tuple(found)


def character_weights(parts: Any, text: str, *, place: str) -> tuple[float, ...]:
    """Return the weight of each character of a text.

    Args:
        parts: Segments ``{"text", "weight"}`` that together are the text, up to white space; or spans
            ``{"start", "end", "weight"}`` in characters, outside of which the weight is 1. ``[]`` for weights of 1.
        text: The answer.
        place: Row and column, for messages.

    Raises:
        DataError: The parts have another form or do not fit the text, or a weight is negative or not finite.

    Example:
        >>> character_weights([{"start": 1, "end": 3, "weight": 0.5}], "abcd", place="here")
        (1.0, 0.5, 0.5, 1.0)
    """
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise DataError(f"{place} is {shown(parts)}; it must be {_FORM}.")
    keys = {frozenset(part) for part in parts}
    if not parts:
        return (1.0,) * len(text)
    if keys == {frozenset({"text", "weight"})}:
        return _of_segments(parts, text, place)
    if keys == {frozenset({"start", "end", "weight"})}:
        return _of_spans(parts, text, place)
    raise DataError(f"{place} has entries with the keys {sorted(sorted(each) for each in keys)}; it must be {_FORM}.")


def _weight(part: Mapping[str, Any], place: str) -> float:
    value = part["weight"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise DataError(f"{place} has the weight {shown(value)}; it must be a finite number, not negative.")
    return float(value)


def _of_segments(parts: Sequence[Mapping[str, Any]], text: str, place: str) -> tuple[float, ...]:
    weights, at = [1.0] * len(text), 0
    for number, part in enumerate(parts):
        for character in str(part["text"]):
            if character.isspace():
                continue
            while at < len(text) and text[at].isspace():
                at += 1
            if at == len(text) or text[at] != character:
                raise DataError(
                    f"{place}: segment {number} ({shown(part['text'])}) does not continue the answer, which goes on "
                    f"with {shown(text[at : at + 40])}: the segments must together be the whole answer."
                )
            weights[at] = _weight(part, place)
            at += 1
    if rest := text[at:].strip():
        raise DataError(f"{place}: the segments end before the answer does; {shown(rest[:40])} has no weight.")
    return tuple(weights)


def _of_spans(parts: Sequence[Mapping[str, Any]], text: str, place: str) -> tuple[float, ...]:
    weights, taken = [1.0] * len(text), [False] * len(text)
    for number, part in enumerate(parts):
        start, end = part["start"], part["end"]
        whole = all(isinstance(each, int) and not isinstance(each, bool) for each in (start, end))
        if not whole or not 0 <= start < end <= len(text):
            raise DataError(
                f"{place}: span {number} is {shown(start)} to {shown(end)}; it must lie within the {len(text)} "
                "characters of the answer, and end after it starts."
            )
        if any(taken[start:end]):
            raise DataError(f"{place}: span {number} ({start} to {end}) overlaps one before it.")
        taken[start:end] = [True] * (end - start)
        weights[start:end] = [_weight(part, place)] * (end - start)
    return tuple(weights)


def token_weights(
    weights: Sequence[float], answer: str, full: str, *, start: int, boundary: int, tokenizer: Tokenizer, place: str
) -> tuple[float, ...]:
    """Return the weight of each token of a completion: the mean over its characters, without white space.

    Tokens without a character of the answer, such as the stop token, have the weight 1.

    Args:
        weights: Weight of each character of the answer.
        answer: The answer as the row has it.
        full: Prompt and answer as the tokenizer reads them.
        start: A position in ``full`` at or before the answer, and after the same text in the prompt.
        boundary: Number of tokens of ``full`` that belong to the prompt, without a BOS that the text lacks.
        tokenizer: A tokenizer that gives the characters of its tokens.
        place: The row, for messages.

    Raises:
        ConfigError: The tokenizer does not give them.
        DataError: The answer is not in the text.
    """
    bare = answer.strip()
    begin = full.find(bare, start)
    if begin < 0:
        raise DataError(f"{place}: the template changes the answer {shown(bare)}, so that weights cannot be placed.")
    offset = begin - (len(answer) - len(answer.lstrip()))  # of the answer's first character
    try:
        spans = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    except NotImplementedError as error:
        raise ConfigError(
            f"{place}: weights of tokens need a fast tokenizer, which gives the characters of each token: load one."
        ) from error
    found = []
    for first, last in spans[boundary:]:
        own = [
            weights[i - offset]
            for i in range(max(first, offset), min(last, offset + len(answer)))
            if not full[i].isspace()
        ]
        found.append(sum(own) / len(own) if own else 1.0)
    return tuple(found)
