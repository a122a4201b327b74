"""Stored completions of the reference: token ids and log-probabilities, from ``falign sample --verifier``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from falign.data import Row, read_rows
from falign.errors import DataError
from falign.scoring import PromptTree
from falign.training.scored_trees import ScoredTree

__all__ = ["read_rehearsal"]


def read_rehearsal(path: str) -> list[ScoredTree]:
    """Return the stored completions of a file.

    Raises:
        DataError: A row lacks token ids or log-probabilities, or the two differ in number.
    """
    trees = [_tree(row) for row in read_rows(path)]
    if not trees:
        raise DataError(f"{path} has no stored completion: lower the threshold of `falign sample`, or leave it out.")
    return trees


def _tree(row: Row) -> ScoredTree:
    prompt, completion = (_numbers(row, name, int) for name in ("prompt_ids", "completion_ids"))
    logprobs = _numbers(row, "logprobs", float)
    if len(logprobs) != len(completion):
        raise DataError(f"{row.place}: {len(logprobs)} logprobs for {len(completion)} completion_ids; sample it anew.")
    columns: Mapping[str, Any] = {
        "reference_logprobs": [logprobs],
        "from_reference": [True],
        "rewards": [0.0],
    }
    return ScoredTree(PromptTree(tuple(map(int, prompt)), (tuple(map(int, completion)),), place=row.place), columns)


def _numbers(row: Row, name: str, kind: type[int] | type[float]) -> list[float]:
    values = row.fields.get(name)
    if not isinstance(values, list) or not values or not all(isinstance(value, int | kind) for value in values):
        raise DataError(
            f"{row.place}: {name!r} is no list of numbers; a rehearsal file is written by `falign sample --verifier`."
        )
    return values
