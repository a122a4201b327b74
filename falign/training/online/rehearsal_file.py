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
"""For each part of the sampler's identity that is compared, what a message says where it differs."""


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
"""By how much a log-probability may be above 0."""


def read_rehearsal(path: str, *, num_tokens: int) -> RolloutBuffer:
    """Return the stored completions of a file.

    Args:
        path: The file.
        num_tokens: Of the tokenizer; no id may be as large.

    Raises:
        DataError: The file is not as ``falign sample`` wrote it; or a row lacks token ids or log-probabilities, has
            some that cannot be, or the two differ in number.
    """
    _check_unedited(path)
    found = [_stored(row, num_tokens) for row in read_rows(path)]
    if not found:
        raise DataError(f"{path} has no stored completion: lower the threshold of `falign sample`, or leave it out.")
    trees, logprobs = zip(*found, strict=True)
    columns = {
        "reference_logprobs": padded(logprobs),
        "from_reference": torch.ones(len(trees), dtype=torch.bool),
    }
    return RolloutBuffer(trees).with_columns(columns)


def other_origin(path: str, **expected: str) -> str | None:
    """Say how the model that sampled a file differs from the one whose log-probabilities are expected in it.

    Args:
        path: The file.
        expected: Of the reference, the hashes of its ``weights`` (base and adapter together, where it has one) and of
            its ``config``; of the run, the fingerprint of its ``tokenizer``.

    Returns:
        None where they are the same, and for a file that ``falign sample`` did not write.

    Raises:
        DataError: The summary beside the file is damaged.
    """
    origin = _summary(path).get("sampled_by")
    if not origin:
        return None
    found = dict(origin)
    if "adapter" in origin:
        found["weights"] = text_hash(f"{origin['weights']} {origin['adapter']}")
    what = next((what for name, what in COMPARED.items() if found.get(name, expected[name]) != expected[name]), None)
    return None if what is None else f"{path} was sampled from {origin['model']}, whose {what}"


def _check_unedited(path: str) -> None:
    """Refuse a file that is not as it was sampled; one without a checksum in a summary beside it is of another origin.

    Raises:
        DataError: It was edited or damaged, or the summary is.
    """
    file = Path(path)
    written = _summary(path).get("sha256", {}).get(file.name)
    if written is not None and hashlib.sha256(file.read_bytes()).hexdigest() != written:
        raise DataError(
            f"{path} is not as it was sampled (its checksum is not that of {file.with_name(SUMMARY)}): restore it, or "
            "sample it anew by `falign sample ... --overwrite`. To use it as it is, give it another name."
        )


def _summary(path: str) -> _Summary:
    """Return what ``falign sample`` has written beside a file; empty where it has written none."""
    summary = Path(path).with_name(SUMMARY)
    if not Path(path).is_file() or not summary.is_file():
        return {}
    try:
        return _SUMMARY.validate_json(summary.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{summary} is damaged ({one_line(error)}), and says what sampled {path}: restore it, "
            "or sample anew by `falign sample ... --overwrite`."
        ) from error


def _stored(row: Row, num_tokens: int) -> tuple[PromptTree, list[float]]:
    prompt, completion = (tuple(map(int, _numbers(row, name, int))) for name in ("prompt_ids", "completion_ids"))
    logprobs = list(map(float, _numbers(row, "logprobs", float)))
    if strange := [id_ for id_ in prompt + completion if not 0 <= id_ < num_tokens]:
        raise DataError(
            f"{row.place}: there is no token {strange[0]} among the tokenizer's {num_tokens}: sample with this model."
        )
    if strange := [value for value in logprobs if not -math.inf < value < ROUNDING]:
        raise DataError(f"{row.place}: {strange[0]} in 'logprobs' is the logarithm of no probability; sample it anew.")
    if len(logprobs) != len(completion):
        raise DataError(f"{row.place}: {len(logprobs)} logprobs for {len(completion)} completion_ids; sample it anew.")
    return PromptTree(prompt, (completion,), place=row.place), logprobs


def _numbers(row: Row, name: str, kind: type[int] | type[float]) -> list[Any]:
    values = row.fields.get(name)
    if not isinstance(values, list) or not values or not all(_is_number(v, kind) for v in values):
        raise DataError(
            f"{row.place}: {name!r} is no list of numbers; a rehearsal file is written by `falign sample --verifier`."
        )
    return values


def _is_number(value: Any, kind: type[int] | type[float]) -> bool:
    return isinstance(value, int | kind) and not isinstance(value, bool)
