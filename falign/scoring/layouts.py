"""The two layouts: prompt trees packed into rows, and one padded row per completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch

from falign.scoring.batch import PromptTree, TokenBatch, lay_out, preferences

__all__ = ["LAYOUTS", "Layout", "pack", "pad"]

Layout = Literal["tree", "padded"]


def pack(
    trees: Sequence[PromptTree],
    *,
    pad_token_id: int,
    row_tokens: int | None = None,
    pad_to_multiple_of: int = 1,
) -> TokenBatch:
    """Lay out each prompt once, followed by all its completions, and pack these trees into rows.

    Args:
        trees: The prompts and completions; preferences for all trees or for no tree.
        pad_token_id: Id of the filling; any valid id, also the end-of-sequence token.
        row_tokens: Largest number of tokens in a row, raised to that of the longest tree. None puts all trees into one
            row without filling: attention costs the sum over trees, not the square of the row.
        pad_to_multiple_of: L is rounded up to a multiple of this.

    Returns:
        The batch, on the CPU; its completions are in the order of the trees.

    Raises:
        ValueError: If there is no tree, or only some of them have a preference.

    Example:
        >>> batch = pack([PromptTree((5, 6), ((7, 2), (8, 9, 2)))], pad_token_id=2)
        >>> batch.input_ids
        tensor([[5, 6, 7, 2, 8, 9, 2]])
        >>> batch.position_ids
        tensor([[0, 1, 2, 3, 2, 3, 4]])
        >>> batch.predictor
        tensor([[1, 2, 0],
                [1, 4, 5]])
    """
    preference = preferences(trees)
    rows = [0] * len(trees)
    if row_tokens is not None:
        lengths = [tree.num_tokens for tree in trees]
        rows = _first_fit(lengths, max(row_tokens, *lengths))
    return lay_out(
        trees,
        rows,
        prompt_index=range(len(trees)),
        preference=preference,
        pad_token_id=pad_token_id,
        pad_to_multiple_of=pad_to_multiple_of,
    )


def pad(trees: Sequence[PromptTree], *, pad_token_id: int, pad_to_multiple_of: int = 1) -> TokenBatch:
    """Give every completion a row with its own copy of the prompt, padded on the right; every model can read this.

    Args:
        trees: The prompts and completions; preferences for all trees or for no tree.
        pad_token_id: Id of the filling after a completion; any valid id, also the end-of-sequence token.
        pad_to_multiple_of: L is rounded up to a multiple of this.

    Returns:
        The batch, on the CPU; its completions are in the order of the trees.

    Raises:
        ValueError: If there is no tree, or only some of them have a preference.

    Example:
        >>> batch = pad([PromptTree((5, 6), ((7, 2), (8, 9, 2)))], pad_token_id=2)
        >>> batch.input_ids
        tensor([[5, 6, 7, 2, 2],
                [5, 6, 8, 9, 2]])
        >>> batch.completion_mask
        tensor([[ True,  True, False],
                [ True,  True,  True]])
        >>> batch.predictor
        tensor([[1, 2, 0],
                [6, 7, 8]])
    """
    preference = preferences(trees)
    singles = [PromptTree(tree.prompt_ids, (ids,), place=tree.place) for tree in trees for ids in tree.completion_ids]
    batch = lay_out(
        singles,
        range(len(singles)),
        prompt_index=[i for i, tree in enumerate(trees) for _ in tree.completion_ids],
        preference=preference,
        pad_token_id=pad_token_id,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    lengths = torch.tensor([span.length for span in batch.spans])
    columns = torch.arange(batch.input_ids.shape[1])
    # Positions continue through the padding, as in the models' own default numbering.
    positions = columns.expand_as(batch.input_ids).contiguous()
    return replace(batch, position_ids=positions, attention_mask=(columns < lengths[:, None]).long())


LAYOUTS: dict[Layout, Callable[..., TokenBatch]] = {"tree": pack, "padded": pad}


def _first_fit(lengths: Sequence[int], room: int) -> list[int]:
    """Return the row of each item by first-fit decreasing: longest first, each into the first row with room."""
    rows, used = [0] * len(lengths), []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, total in enumerate(used) if total + lengths[i] <= room), len(used))
        if row == len(used):
            used.append(0)
        used[row] += lengths[i]
        rows[i] = row
    return rows
