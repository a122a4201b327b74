"""Stored completions of the reference: token ids and log-probabilities, from ``falign sample --verifier``."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from falign.data import Row, read_rows
from falign.errors import DataError, one_line
from falign.rollouts.buffer import RolloutBuffer, padded
from falign.runs.inputs import text_hash
from falign.scoring import PromptTree

__all__ = ["other_origin", "read_rehearsal"]

SUMMARY = "summary.json"
COMPARED = {
    "weights": "weights are not those of the reference at its precision",
    "config": "configuration (config.json) is not that of the reference",
    "tokenizer": "tokenizer or chat template is not that of the run",
}
"""The message if a part of the sampling model's identity differs."""


class _Summary(TypedDict, total=False):
    sampled_by: _SampledBy
    sha256: dict[str, str]


class _SampledBy(TypedDict):
    model: str
    weights: str
    adapter: NotRequired[str]
    config: NotRequired[str]
    tokenizer: NotRequired[str]


_SUMMARY = TypeAdapter(_Summary)

ROUNDING = 1e-3
"""Upper bound of a stored log-probability; rounding may put it slightly above 0."""


def read_rehearsal(path: str, *, num_tokens: int) -> RolloutBuffer:
    """Return the stored completions of a file.

    Args:
        path: The file.
        num_tokens: Number of tokens in the tokenizer; ids must be below it.

    Raises:
        DataError: The file was changed after ``falign sample`` wrote it; or token ids or log-probabilities of a row are
            missing, invalid, or different in number.
    """
    _check_unedited(path)
    found = [_stored(row, num_tokens) for row in read_rows(path)]
    if not found:
        raise DataError(
            f"{path} has no stored completions: lower the threshold of `falign sample`, or leave out rehearsal."
        )
    trees, logprobs = zip(*found, strict=True)
    columns = {
        "reference_logprobs": padded(logprobs),
        "from_reference": torch.ones(len(trees), dtype=torch.bool),
    }
    return RolloutBuffer(trees).with_columns(columns)


def other_origin(path: str, **expected: str) -> str | None:
    """Return how the model that sampled a file differs from the expected one.

    Args:
        path: The file.
        expected: Hashes of the reference's ``weights`` (base and adapter together, if it has one) and ``config``, and
            the fingerprint of the run's ``tokenizer``.

    Returns:
        A message; None if they agree or ``falign sample`` did not write the file.

    Raises:
        DataError: The summary next to the file is damaged.
    """
    origin = _summary(path).get("sampled_by")
    if not origin:
        return None
    found = dict(origin)
    if "adapter" in origin:
        found["weights"] = text_hash(f"{origin['weights']} {origin['adapter']}")
    # A hash that the summary lacks (older versions wrote fewer) counts as equal.
    what = next((what for name, what in COMPARED.items() if found.get(name, expected[name]) != expected[name]), None)
    return None if what is None else f"{path} was sampled from {origin['model']}, whose {what}"


def _check_unedited(path: str) -> None:
    """Refuse a file that was changed after ``falign sample`` wrote it with a checksum; other files are accepted.

    Raises:
        DataError: The file was edited or damaged, or the summary is damaged.
    """
    file = Path(path)
    written = _summary(path).get("sha256", {}).get(file.name)
    if written is not None and hashlib.sha256(file.read_bytes()).hexdigest() != written:
        raise DataError(
            f"{path} was changed after sampling (its checksum is not that in {file.with_name(SUMMARY)}): restore it, "
            "or sample it again by `falign sample ... --overwrite`. To use it as it is, give it another name."
        )


def _summary(path: str) -> _Summary:
    """Return the summary that ``falign sample`` wrote next to a file; empty without one."""
    summary = Path(path).with_name(SUMMARY)
    if not Path(path).is_file() or not summary.is_file():
        return {}
    try:
        return _SUMMARY.validate_json(summary.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{summary} is damaged ({one_line(error)}), and says what sampled {path}: restore it, "
            "or sample again by `falign sample ... --overwrite`."
        ) from error


def _stored(row: Row, num_tokens: int) -> tuple[PromptTree, list[float]]:
    prompt, completion = (tuple(map(int, _numbers(row, name, int))) for name in ("prompt_ids", "completion_ids"))
    logprobs = list(map(float, _numbers(row, "logprobs", float)))
    if invalid := [id_ for id_ in prompt + completion if not 0 <= id_ < num_tokens]:
        raise DataError(
            f"{row.place}: token id {invalid[0]} is not among the tokenizer's {num_tokens}: sample with this model."
        )
    if invalid := [value for value in logprobs if not -math.inf < value < ROUNDING]:
        raise DataError(
            f"{row.place}: {invalid[0]} in 'logprobs' is not the logarithm of a probability; sample it again."
        )
    if len(logprobs) != len(completion):
        raise DataError(f"{row.place}: {len(logprobs)} logprobs for {len(completion)} completion_ids; sample it again.")
    return PromptTree(prompt, (completion,), place=row.place), logprobs


def _numbers(row: Row, name: str, kind: type[int] | type[float]) -> list[Any]:
    values = row.fields.get(name)
    if not isinstance(values, list) or not values or not all(_is_number(v, kind) for v in values):
        raise DataError(
            f"{row.place}: {name!r} is not a list of numbers; `falign sample --verifier` writes rehearsal files."
        )
    return values


def _is_number(value: Any, kind: type[int] | type[float]) -> bool:
    # In Python, True is an int; and JSON writes a float such as -2.0 as -2 in some programs.
    return isinstance(value, int | kind) and not isinstance(value, bool)
