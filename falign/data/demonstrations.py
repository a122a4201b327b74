"""Preference data as demonstrations: objectives that imitate learn from preferred completions alone."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from falign.data.preferences import PreferenceData
from falign.errors import DataError
from falign.scoring.trees import PromptTree

__all__ = ["Demonstrations", "demonstrations"]


class Demonstrations(NamedTuple):
    """Data reduced to preferred completions.

    Attributes:
        data: The completions to imitate.
        rejected: How many completions were left out, because another of their row is preferred.
        undesirable: How many rows were left out, because their label is false.
    """

    data: PreferenceData
    rejected: int
    undesirable: int


def demonstrations(data: PreferenceData) -> Demonstrations:
    """Return the completions to imitate: the most preferred ones of pairs and lists, and those labeled true.

    Raises:
        DataError: Nothing is left.
    """
    train, eval = ([_preferred(tree) for tree in side] for side in (data.train, data.eval))
    before = [*data.train, *data.eval]
    kept = [tree for tree in (*train, *eval) if tree is not None]
    found = [tree for tree in train if tree is not None]
    if not found:
        raise DataError(f"{data.train[0].place}: all rows are labeled false, so there is nothing to imitate.")
    held_out = [tree for tree in eval if tree is not None]
    undesirable = len(before) - len(kept)
    rejected = sum(len(tree.completion_ids) for tree in before) - sum(len(tree.completion_ids) for tree in kept)
    report = replace(data.report, num_train=len(found), num_eval=len(held_out))
    return Demonstrations(PreferenceData(found, held_out, report), rejected - undesirable, undesirable)


def _preferred(tree: PromptTree) -> PromptTree | None:
    values = tree.preference
    if values is None:
        return tree
    if len(values) == 1:  # a label
        return tree if values[0] > 0 else None
    best = max(values)
    pairs = zip(tree.completion_ids, values, strict=True)
    chosen = [(ids, value) for ids, value in pairs if value == best]
    return replace(tree, completion_ids=tuple(ids for ids, _ in chosen), preference=tuple(value for _, value in chosen))
