"""Stored completions of the reference: token ids and log-probabilities, from ``falign sample --verifier``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from falign.data import Row, read_rows
from falign.errors import DataError
from falign.scoring import PromptTree
from falign.training.scored_trees import ScoredTree

__all__ = ["read_rehearsal", "sampled_by"]

ROUNDING = 1e-3
"""By how much a log-probability may be above 0."""


def read_rehearsal(path: str, *, num_tokens: int) -> list[ScoredTree]:
    """Return the stored completions of a file.

    Args:
        path: The file.
        num_tokens: Of the tokenizer; no id may be as large.

    Raises:
        DataError: A row lacks token ids or log-probabilities, has some that cannot be, or the two differ in number.
    """
    trees = [_tree(row, num_tokens) for row in read_rows(path)]
    if not trees:
        raise DataError(f"{path} has no stored completion: lower the threshold of `falign sample`, or leave it out.")
    return trees


def sampled_by(path: str) -> dict[str, Any]:
    """Return what sampled a file, as ``falign sample`` has written beside it; empty for a file of another origin."""
    summary = Path(path).with_name("summary.json")
    if not summary.is_file():
        return {}
    return json.loads(summary.read_text(encoding="utf-8")).get("sampled_by", {})


def _tree(row: Row, num_tokens: int) -> ScoredTree:
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
    columns: Mapping[str, Any] = {
        "reference_logprobs": [logprobs],
        "from_reference": [True],
        "rewards": [0.0],
    }
    return ScoredTree(PromptTree(prompt, (completion,), place=row.place), columns)


def _numbers(row: Row, name: str, kind: type[int] | type[float]) -> list[Any]:
    values = row.fields.get(name)
    if not isinstance(values, list) or not values or not all(_is_number(v, kind) for v in values):
        raise DataError(
            f"{row.place}: {name!r} is no list of numbers; a rehearsal file is written by `falign sample --verifier`."
        )
    return values


def _is_number(value: Any, kind: type[int] | type[float]) -> bool:
    return isinstance(value, int | kind) and not isinstance(value, bool)
