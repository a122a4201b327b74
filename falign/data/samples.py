"""Samples: completions of prompts with rewards, as `falign sample` or another program has written them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from falign.choices import shown
from falign.data.conversations import TOOL_CALLS, Message, Text
from falign.data.examples import Example, user_turns
from falign.data.files import Row
from falign.data.recognition import RowReader
from falign.data.reports import BadRows
from falign.data.sources import DataSource, rows_of
from falign.data.text_values import is_blank
from falign.errors import DataError

__all__ = [
    "COLUMNS_OF_PROMPT",
    "REWARD",
    "Sample",
    "completion_of",
    "read_samples",
    "same_prompt",
    "sample_row",
    "text_sha256",
]

COLUMNS_OF_PROMPT = "columns"
"""Column of a file of samples with the other columns of the prompt's row, for rewards."""

REWARD = "reward"
"""Column with the reward of a completion."""


@dataclass(frozen=True)
class Sample:
    """One completion of a prompt.

    Attributes:
        prompt: Plain text, or turns.
        completion: The text of the completion.
        place: The row it came from, for messages.
        index: Number of the completion within its row, from 0; a row of a ranked list has several.
        reward: Its reward; None if the row has none.
        truncated: Whether it ended at the maximum length, without a stop token.
        columns: The other columns of the row, for rewards.
    """

    prompt: Text
    completion: str
    place: str
    index: int = 0
    reward: float | None = None
    truncated: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict)


def same_prompt(prompt: Text) -> str:
    """Return a key that is equal for the same prompt: the same text, or the same turns.

    Example:
        >>> same_prompt("Name a color.") == same_prompt([{"role": "user", "content": "Name a color."}])
        False
    """
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def text_sha256(prompt: Text, completion: Text) -> str:
    """Return a hash of a prompt and its completion; whether plain texts are read as turns does not change it.

    Example:
        >>> turns = [{"role": "user", "content": "Name a color."}]
        >>> text_sha256("Name a color.", "Blue") == text_sha256(turns, [{"role": "assistant", "content": "Blue"}])
        True
        >>> text_sha256("Name a color.", "Blue") == text_sha256("Name a color.", "Red")
        False
    """
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    several = not isinstance(completion, str) and (len(completion) > 1 or TOOL_CALLS in completion[0])
    content = json.dumps([user_turns(prompt), completion if several else text.strip()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def completion_of(sample: Sample) -> Text:
    """Return the completion in the form of its prompt: a text, or one assistant turn."""
    if isinstance(sample.prompt, str):
        return sample.completion
    turns: list[Message] = [{"role": "assistant", "content": sample.completion}]
    return turns


def sample_row(sample: Sample, number: int, **fields: Any) -> dict[str, Any]:
    """Return a sample as a row of a file, which every reader of prompts with completions understands.

    Args:
        sample: The sample; a missing reward and an empty mapping of columns are left out.
        number: Its number among the samples of its prompt.
        fields: Further columns.
    """
    row = {"prompt": sample.prompt, "completion": sample.completion, "sample": number, **fields}
    row |= {"finish_reason": "length"} if sample.truncated else {"finish_reason": "stop"}
    row |= {} if sample.reward is None else {REWARD: sample.reward}
    return row | ({COLUMNS_OF_PROMPT: dict(sample.columns)} if sample.columns else {})


def read_samples(source: DataSource, *, reward: str = REWARD, bad_rows: BadRows | None = None) -> Iterator[Sample]:
    """Yield the completions of a source, those that are empty included.

    A row is a prompt with one completion, or with a list of them (format ``ranked``). Its reward is the column
    `reward`, or else its ``scores`` or ``label``.

    Args:
        source: Location and layout of the rows.
        reward: Column with the reward.
        bad_rows: Receives the rows that cannot be used; by default the first one raises.

    Raises:
        DataError: The source cannot be read, or a row is neither.
    """
    reader, bad_rows = RowReader.of(source), bad_rows or BadRows()
    for row in rows_of(source.path, source.rows, split=source.split, bad_rows=bad_rows):
        try:
            samples = _samples_of(row, reader, reward)
        except DataError as error:
            bad_rows.add(error)
            continue
        yield from samples


def _samples_of(row: Row, reader: RowReader, reward: str) -> list[Sample]:
    # A policy may answer nothing. Such a row is a sample, though nothing can be trained on it.
    is_empty = "completion" in row.fields and is_blank(row.fields["completion"])
    example = reader.read(Row(row.place, {**row.fields, "completion": "(empty)"}) if is_empty else row)
    known = _columns_of(row.fields)
    if reward != REWARD and reward not in row.fields and not is_empty:
        raise DataError(
            f"{row.place}: there is no column {reward!r} with the reward; the row has {sorted(row.fields)}: name the "
            "column that holds it."
        )
    given = _reward(row, reward)
    rewards: tuple[float | None, ...] = example.preference or (None,) * len(example.completions)
    if given is not None:
        if len(rewards) != 1:
            raise DataError(
                f"{row.place}: {reward!r} is one number for {len(rewards)} completions: name them `scores`, in a list."
            )
        rewards = (given,)
    return [
        Sample(
            prompt=example.prompt,
            completion="" if is_empty else _text_of(completion, example),
            place=row.place,
            index=number,
            reward=value,
            truncated=row.fields.get("finish_reason") == "length",
            columns=known,
        )
        for number, (completion, value) in enumerate(zip(example.completions, rewards, strict=True))
    ]


def _columns_of(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    own = fields.get(COLUMNS_OF_PROMPT)
    if isinstance(own, Mapping):
        return own
    read = {"prompt", "completion", "completions", "messages", "scores", "ranks", "label", REWARD}
    return {name: value for name, value in fields.items() if name not in read}


def _reward(row: Row, name: str) -> float | None:
    value = row.fields.get(name)
    if is_blank(value):
        return None
    if isinstance(value, str):  # CSV stores every value as text
        value = _number(value)
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise DataError(f"{row.place}: {name!r} is {shown(value)}; it must be a finite number, or missing.")
    return float(value)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _text_of(completion: Text, example: Example) -> str:
    if isinstance(completion, str):
        return completion
    if len(completion) > 1 or TOOL_CALLS in completion[0]:
        raise DataError(
            f"{example.place}: the completion has several turns or calls tools, and a sample is one text; leave the "
            "row out."
        )
    return completion[0]["content"]
