"""Labels of single completions, and prompts paired with the completions of other prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import dropwhile, takewhile
from operator import itemgetter
from typing import NamedTuple

from falign.errors import DataError
from falign.scoring.batch import PromptTree

__all__ = ["Labels", "label_counts", "mismatched"]


class Labels(NamedTuple):
    """The numbers of completions with each label."""

    desirable: int
    undesirable: int


def label_counts(trees: Sequence[PromptTree]) -> Labels:
    """Count the labels of completions, and refuse rows without them.

    Args:
        trees: Rows with a label, 1 or 0, for each completion: unpaired data, or pairs, whose completions count as one
            desirable and one undesirable row each.

    Raises:
        DataError: A row has no labels, or scores of a ranked list.
    """
    counts: Counter[float] = Counter()
    for tree in trees:
        if tree.preference is None:
            raise DataError(
                f"{tree.place}: the row has no label, which this objective needs: add a column 'label' (true or "
                "false), or give pairs (chosen and rejected)."
            )
        if other := [value for value in tree.preference if value not in (0.0, 1.0)]:
            raise DataError(
                f"{tree.place}: the row has the score {other[0]:g}, and this objective needs labels: give rows with "
                "'label' (true or false), or pairs (chosen and rejected), in place of a ranked list."
            )
        counts.update(tree.preference)
    return Labels(counts[1.0], counts[0.0])


def mismatched(trees: Sequence[PromptTree]) -> list[PromptTree]:
    """Return the rows with ``mismatched_ids``: the completions of the next row that has another prompt.

    The first row follows the last.

    Of a completion of several turns, the first that counts is taken. A completion is cut where prompt and completion
    would be longer than the longest row. The pairing depends only on the rows, so estimates from it do not depend on
    how they are batched.

    Args:
        trees: Rows of at least two different prompts.

    Raises:
        DataError: All rows have the same prompt.

    Example:
        >>> rows = [PromptTree((1,), ((5, 2),)), PromptTree((1,), ((6, 2),)), PromptTree((3,), ((7, 2),))]
        >>> [tree.mismatched_ids for tree in mismatched(rows)]
        [((7, 2),), ((7, 2),), ((5, 2),)]
    """
    if all(tree.prompt_ids == trees[0].prompt_ids for tree in trees):
        place = f"{trees[0].place}: " if trees else ""
        raise DataError(
            f"{place}all {len(trees)} rows have the same prompt, so no completion belongs to another one, from which "
            "the reference point is estimated: add other prompts, or choose another reference point."
        )
    longest = max(tree.longest_path for tree in trees)
    found: list[PromptTree] = []
    # From the end, following[i] is the next row with another prompt; the rows are read twice, to follow past the end.
    following, other = trees[0], trees[0]
    for tree in [*reversed(trees), *reversed(trees)]:
        if tree.prompt_ids != following.prompt_ids:
            other = following
        following = tree
        room = longest - len(tree.prompt_ids)
        found.append(replace(tree, mismatched_ids=tuple(ids[:room] for ids in _first_turns(other))))
    return found[len(trees) :][::-1]


def _first_turns(tree: PromptTree) -> tuple[tuple[int, ...], ...]:
    found = []
    for ids, counted in zip(tree.completion_ids, tree.counted_or_none, strict=True):
        own = zip(ids, (True,) * len(ids) if counted is None else counted, strict=True)
        turn = takewhile(itemgetter(1), dropwhile(lambda each: not each[1], own))
        found.append(tuple(id_ for id_, _ in turn))
    return tuple(found)
