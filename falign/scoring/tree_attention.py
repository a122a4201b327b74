"""Attention within prompt trees: every token sees its prompt and what precedes it in its own completion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from falign.scoring.batch import TreeSpan
from falign.scoring.tree_calls import attend_in_tree, sees

__all__ = ["TreeMask"]


class TreeMask(Tensor):
    """The mask of a batch of trees, which SDPA takes as its `attn_mask` and which is never written out.

    To a model it is a boolean tensor of shape (R, 1, L, L). `scaled_dot_product_attention` called with it attends
    tree by tree, so that its cost is that of the trees and not the square of the row: on a GPU by FlexAttention with a
    block mask, elsewhere by causal calls for the prompt and for each long completion behind it, or one call for all
    the short ones. What fills a row attends nowhere and gets zeros.
    """

    spans: tuple[TreeSpan, ...]
    window: int | None
    _made: dict[Any, Any]

    @classmethod
    def of(
        cls,
        spans: Sequence[TreeSpan],
        *,
        shape: tuple[int, int],
        device: torch.device,
        window: int | None = None,
    ) -> TreeMask:
        """Make the mask of a batch.

        Args:
            spans: The trees.
            shape: R rows and L columns.
            device: Where the model is.
            window: A token sees only tokens at fewer than so many positions before its own; None sees all.

        Returns:
            The mask.
        """
        rows, columns = shape
        mask = Tensor._make_wrapper_subclass(cls, (rows, 1, columns, columns), dtype=torch.bool, device=device)
        mask.spans, mask.window = tuple(spans), window
        mask._made = {}
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        raise TypeError(f"A TreeMask is a mask for scaled_dot_product_attention alone, not for {func}; see dense().")

    @property
    def columns(self) -> int:
        """L, the length of a row."""
        return self.shape[-1]

    def dense(self) -> Bool[Tensor, "R 1 L L"]:
        """Return the mask written out: True where the query (third axis) sees the key; filling sees itself.

        Returns:
            A plain boolean tensor.
        """
        dense = torch.eye(self.columns, dtype=torch.bool).repeat(self.shape[0], 1, 1, 1)
        for span in self.spans:
            inside = slice(span.start, span.start + span.length)
            dense[span.row, 0, inside, inside] = sees(span, self.window)
        return dense.to(self.device)

    def additive(self, dtype: torch.dtype) -> Float[Tensor, "R 1 L L"]:
        """Return the mask written out for eager attention, which adds it to scores.

        Args:
            dtype: The scores' type.

        Returns:
            0 where seen, the type's smallest number elsewhere.
        """
        dense = self.dense()
        return torch.zeros(dense.shape, dtype=dtype, device=dense.device).masked_fill(~dense, torch.finfo(dtype).min)

    def once(self, key: Any, make: Any) -> Any:
        """Return what was made under this key, for all layers of a forward pass alike."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _attend(
    query: Float[Tensor, "R H L D"],
    key: Float[Tensor, "R K L D"],
    value: Float[Tensor, "R K L E"],
    attn_mask: TreeMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "R H L E"]:
    assert isinstance(attn_mask, TreeMask)
    assert not is_causal
    if dropout_p:
        raise ValueError(
            f"dropout_p={dropout_p}: attention dropout would differ between copies; use the padded layout."
        )
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if query.device.type == "cuda":
        return _flex()(query, key, value, block_mask=attn_mask.once("block", lambda: _block_mask(attn_mask)), **options)
    pieces = [
        torch.cat(list(_row(query[r : r + 1], key[r : r + 1], value[r : r + 1], attn_mask, r, options)), dim=1)
        for r in range(query.shape[0])
    ]
    # As SDPA's own results, (R, L, H, E) in memory: models transpose and flatten it.
    return torch.cat(pieces).transpose(1, 2)


def _row(
    query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, row: int, options: dict[str, Any]
) -> Iterator[Float[Tensor, "1 S H E"]]:
    """Yield the results of one row, piece by piece."""
    spans = [span for span in mask.spans if span.row == row]
    sizes = [span.length for span in spans]
    filling = mask.columns - sum(sizes)
    parts = [tensor.split([*sizes, filling], dim=2) for tensor in (query, key, value)]
    for span, q, k, v in zip(spans, *parts, strict=False):
        yield from attend_in_tree(span, q, k, v, window=mask.window, once=mask.once, options=options)
    if filling:
        yield value.new_zeros(1, filling, query.shape[1], value.shape[-1])


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _block_mask(mask: TreeMask) -> Any:
    """The same rule for FlexAttention, as integers per position: tree, branch (0 in the prompt), position."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, columns = mask.shape[0], mask.columns
    tree = torch.full((rows, columns), -1)
    branch, position = torch.zeros_like(tree), torch.arange(columns).repeat(rows, 1)
    for number, span in enumerate(mask.spans):
        begin = span.start + span.prompt_length
        tree[span.row, span.start : span.start + span.length] = number
        position[span.row, span.start : begin] = torch.arange(span.prompt_length)
        for completion, length in enumerate(span.completion_lengths, start=1):
            branch[span.row, begin : begin + length] = completion
            position[span.row, begin : begin + length] = torch.arange(length) + span.prompt_length
            begin += length
    tree, branch, position = (tensor.to(mask.device) for tensor in (tree, branch, position))
    window = columns if mask.window is None else mask.window

    # A lambda, since FlexAttention looks for four plain arguments.
    sees = lambda row, head, q, k: (  # noqa: E731
        (tree[row, q] == tree[row, k])
        & ((branch[row, k] == 0) | (branch[row, q] == branch[row, k]))
        & (position[row, q] >= position[row, k])
        & (position[row, q] - position[row, k] < window)
    )
    return create_block_mask(sees, rows, None, columns, columns, device=str(mask.device))
