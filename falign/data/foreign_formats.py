"""Layouts of well-known data sets and libraries, read as they come: UltraFeedback, Nectar, HelpSteer3, HALOs, verl."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from falign.choices import shown
from falign.data.conversations import Text, read_text
from falign.data.examples import Example, build_example, user_turns
from falign.data.files import Row
from falign.data.text_values import is_blank, parsed_list
from falign.errors import DataError

__all__ = ["FOREIGN", "INSIDE", "READ_FOREIGN", "VERL", "foreign_format", "is_verl", "verl_columns"]

VERL = "verl"
"""Name of verl's layout of prompts, in reports."""

TIE = "no answer is preferred"
"""Reason why a comparison that ends in a tie is left out."""


def _entries(row: Row, column: str, wanted: Sequence[str]) -> list[Mapping[str, Any]]:
    entries = parsed_list(row.fields[column])
    fits = isinstance(entries, list) and all(isinstance(each, Mapping) and each.keys() >= {*wanted} for each in entries)
    if not fits or not entries:
        raise DataError(
            f"{row.place}: {column!r} is {shown(row.fields[column])}; it must be a list of objects with "
            f"{', '.join(wanted)}."
        )
    return entries


def _number(value: Any, place: str) -> float:
    if isinstance(value, str):  # CSV stores every value as text
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{place} is {shown(value)}; it must be a finite number.")
    return float(value)


def _compared(
    row: Row, prompt: Text, answers: Sequence[Any], values: Sequence[float], fields: Sequence[str]
) -> Example:
    """Return the example of answers with values, larger is better; one that is left out if all values are equal."""
    completions = [read_text(each, place=row.place, field=field) for each, field in zip(answers, fields, strict=True)]
    tie = len(values) > 1 and len(set(values)) == 1
    # The answers are turns, and so is the prompt.
    prompt = user_turns(prompt)
    example = build_example(
        row.place, prompt=prompt, completions=completions, preference=None if tie else values, fields=fields
    )
    return replace(example, preference=tuple(values), left_out=TIE) if tie else example


def _ultrafeedback(row: Row) -> Example:
    entries = _entries(row, "completions", ["response"])
    score = next((name for name in _SCORES if all(not is_blank(each.get(name)) for each in entries)), None)
    if score is None:
        raise DataError(
            f"{row.place}: 'completions' have no {' and no '.join(map(repr, _SCORES))} for each response; one of them "
            "says which is better."
        )
    fields = [f"completions[{i}].response" for i in range(len(entries))]
    values = [_number(each[score], f"{row.place}: {score!r} of 'completions[{i}]'") for i, each in enumerate(entries)]
    prompt = read_text(row.fields["instruction"], place=row.place, field="instruction")
    return _compared(row, prompt, [each["response"] for each in entries], values, fields)


_SCORES = ("overall_score", "fine-grained_score")


def _nectar(row: Row) -> Example:
    entries = _entries(row, "answers", ["answer", "rank"])
    fields = [f"answers[{i}].answer" for i in range(len(entries))]
    values = [-_number(each["rank"], f"{row.place}: 'rank' of 'answers[{i}]'") for i, each in enumerate(entries)]
    prompt = read_text(row.fields["prompt"], place=row.place, field="prompt")
    return _compared(row, prompt, [_stripped(each["answer"]) for each in entries], values, fields)


def _helpsteer(row: Row) -> Example:
    fields = ("response1", "response2")
    strength = _number(row.fields["overall_preference"], f"{row.place}: 'overall_preference'")
    if not -3 <= strength <= 3:
        raise DataError(
            f"{row.place}: 'overall_preference' is {strength:g}; it goes from -3 (response1 is much better) to 3."
        )
    prompt = read_text(row.fields["context"], place=row.place, field="context")
    # Only the side is read: how much better an answer is has no place in a comparison.
    values = (float(strength < 0), float(strength > 0))
    return _compared(row, prompt, [row.fields[name] for name in fields], values, fields)


def _halos(row: Row) -> Example:
    name = "prompt" if "prompt" in row.fields else "instruction"
    prompt = read_text(row.fields[name], place=row.place, field=name)
    label = row.fields["label"]
    if label not in (0, 1):
        meaning = "1 (output_A is better) or 0" if "output_A" in row.fields else "1 (desirable) or 0"
        raise DataError(f"{row.place}: 'label' is {shown(label)}; it must be {meaning}.")
    if "output_A" in row.fields:
        fields = ("output_A", "output_B")
        values: tuple[float, ...] = (float(label == 1), float(label == 0))
        return _compared(row, prompt, [row.fields[field] for field in fields], values, fields)
    return _compared(row, prompt, [row.fields["output"]], (float(label),), ("output",))


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


FOREIGN: Mapping[str, Callable[[Row], Example]] = {
    "ultrafeedback": _ultrafeedback,
    "nectar": _nectar,
    "helpsteer3": _helpsteer,
    "halos": _halos,
}
"""Readers by layout."""

READ_FOREIGN: Mapping[str, frozenset[str]] = {
    "ultrafeedback": frozenset({"instruction", "completions"}),
    "nectar": frozenset({"prompt", "answers"}),
    "helpsteer3": frozenset({"context", "response1", "response2", "overall_preference"}),
    "halos": frozenset({"prompt", "instruction", "output_A", "output_B", "output", "label"}),
}
"""Columns that each reads."""

INSIDE: Mapping[str, tuple[str, str]] = {"ultrafeedback": ("completions", "custom_system_prompt")}
"""Parts of columns that are left out: the system prompts under which answers were sampled, one for each answer."""


def foreign_format(row: Row) -> str | None:
    """Return the foreign layout of a row, told by its columns and by what they hold; None if it has none."""
    columns = row.fields.keys()
    if columns >= {"instruction", "completions"} and _holds(row, "completions", "response"):
        return "ultrafeedback"
    if columns >= {"prompt", "answers"} and _holds(row, "answers", "rank"):
        return "nectar"
    if columns >= READ_FOREIGN["helpsteer3"]:
        return "helpsteer3"
    judged = columns >= {"output_A", "output_B"} or ("output" in columns and not columns & {"completion", "input"})
    if judged and "label" in columns and columns & {"prompt", "instruction"}:
        return "halos"
    return None


def _holds(row: Row, column: str, key: str) -> bool:
    entries = parsed_list(row.fields[column])
    return isinstance(entries, list) and bool(entries) and isinstance(entries[0], Mapping) and key in entries[0]


def is_verl(fields: Mapping[str, Any]) -> bool:
    """Return whether a row is one of verl's: a prompt with what its answers are judged by."""
    return fields.keys() >= {"data_source", "prompt", "reward_model"}


def verl_columns(fields: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the columns that rewards read of one of verl's rows: ``ground_truth`` of ``reward_model``.

    It is also the column ``answer``, which verifiers read, unless the row has one.

    Raises:
        DataError: There is no ground truth.
    """
    truth = fields["reward_model"].get("ground_truth") if isinstance(fields["reward_model"], Mapping) else None
    if truth is None:
        raise DataError(
            f"{place}: 'reward_model' is {shown(fields['reward_model'])}; it must be an object with 'ground_truth': "
            "correct the row, or set ignore=[reward_model] if the rewards do not read it."
        )
    return {name: truth for name in ("ground_truth", "answer") if name not in fields}
