"""Attention within prompt trees: which token sees which, and how it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from falign.scoring.batch import TokenBatch, TreeSpan
from falign.scoring.model_parts import without_wrapper

__all__ = ["Places", "TreeMask", "layer_types", "text_config", "tree_masks", "visible", "visible_in"]

LONG_COMPLETION = 64
"""Tokens of a completion from which attention costs more than the overhead of a call of its own."""

Once = Callable[[Any, Callable[[], Tensor]], Tensor]
"""A cache: from a key and a function that makes the value to the value."""


class Places(NamedTuple):
    """Places of tokens in their trees; integer tensors of one shape.

    Attributes:
        tree: Index of the tree, from 0; -1 for filling.
        branch: Index of the completion in the tree, from 1; 0 in the prompt.
        position: Distance from the start of the prompt along the token's path.
    """

    tree: Int[Tensor, ...]
    branch: Int[Tensor, ...]
    position: Int[Tensor, ...]

    @classmethod
    def of(cls, spans: Sequence[TreeSpan], *, shape: tuple[int, int]) -> Places:
        """Return the places of R rows of L tokens, on the CPU."""
        tree = torch.full(shape, -1)
        branch, position = torch.zeros_like(tree), torch.arange(shape[1]).repeat(shape[0], 1)
        for number, span in enumerate(spans):
            begin = span.start + span.prompt_length
            tree[span.row, span.start : span.start + span.length] = number
            position[span.row, span.start : begin] = torch.arange(span.prompt_length)
            for completion, length in enumerate(span.completion_lengths, start=1):
                branch[span.row, begin : begin + length] = completion
                position[span.row, begin : begin + length] = torch.arange(length) + span.prompt_length
                begin += length
        return cls(tree, branch, position)

    @no_type_check  # as `visible`
    def at(self, *index: Any) -> Places:
        """Return the places of some tokens."""
        return Places(*(numbers[index] for numbers in self))


@no_type_check  # no shape checks: torch.compile traces this function for FlexAttention and cannot trace them
def visible(query: Places, key: Places, window: int | None) -> Bool[Tensor, ...]:
    """Return True if the query token sees the key token: the attention rule for all layouts of trees.

    A token sees the prompt of its own tree up to its position, and its own completion up to and including itself.

    Args:
        query: Places of the queries.
        key: Places of the keys; the shapes broadcast.
        window: A token sees only keys fewer than this many positions before its own; None means no limit.
    """
    distance = query.position - key.position
    same_path = (query.tree == key.tree) & ((key.branch == 0) | (query.branch == key.branch))
    seen = same_path & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def visible_in(span: TreeSpan, window: int | None) -> Bool[Tensor, "S S"]:
    """Return which of the S tokens of one tree (first axis) sees which (second axis)."""
    alone = Places.of([replace(span, row=0, start=0)], shape=(1, span.length)).at(0)
    return visible(alone.at(slice(None), None), alone.at(None), window)


def tree_masks(model: nn.Module, batch: TokenBatch) -> Tensor | dict[str, Tensor]:
    """Return the `attention_mask` for a model's forward pass on a batch in the tree layout.

    Args:
        model: The model that will read the batch.
        batch: The trees, on the model's device.

    Returns:
        A mask, or one per layer type if the model has several.
    """
    config = text_config(model)

    def mask(window: int | None) -> Tensor:
        rows, columns = batch.input_ids.shape
        tree_mask = TreeMask.of(batch.spans, shape=(rows, columns), device=batch.input_ids.device, window=window)
        if config._attn_implementation == "sdpa":
            return tree_mask
        return tree_mask.additive(next(p.dtype for p in model.parameters() if p.is_floating_point()))

    window = getattr(config, "sliding_window", None)
    types = set(layer_types(config))
    if not types:
        return mask(window)
    windows = {"full_attention": None, "sliding_attention": window}
    if len(types) == 1:
        return mask(windows[types.pop()])
    return {name: mask(windows[name]) for name in sorted(types)}


def text_config(model: nn.Module) -> Any:
    """Return the configuration of a model's layers for text."""
    config = without_wrapper(model).config
    return getattr(config, "get_text_config", lambda: config)()


def layer_types(config: Any) -> list[str]:
    """Return the attention types of the layers; empty if all layers are alike."""
    return getattr(config, "layer_types", None) or []


class TreeMask(Tensor):
    """The mask of a batch of trees, which SDPA accepts as `attn_mask` and which is never materialized.

    To a model it is a boolean tensor of shape (R, 1, L, L). `scaled_dot_product_attention` called with it attends
    tree by tree, so that the cost is the sum over trees and not the square of the row: on a GPU by FlexAttention with
    a block mask, elsewhere by causal calls for the prompt and for each long completion, or by one call for all short
    completions. Filling attends to nothing and gets zeros.
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
        """Build the mask of a batch.

        Args:
            spans: The trees.
            shape: R rows and L columns.
            device: The model's device.
            window: A token sees only keys fewer than this many positions before its own; None means no limit.

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
        raise TypeError(
            f"A TreeMask works only with scaled_dot_product_attention, not with {func}; dense() gives a plain tensor."
        )

    @property
    def columns(self) -> int:
        """L, the length of a row."""
        return self.shape[-1]

    def dense(self) -> Bool[Tensor, "R 1 L L"]:
        """Return the mask as a dense tensor: True where the query (third axis) sees the key; filling sees itself.

        Returns:
            A plain boolean tensor.
        """
        places = Places.of(self.spans, shape=(self.shape[0], self.columns))
        query, key = places.at(slice(None), slice(None), None), places.at(slice(None), None)
        seen = visible(query, key, self.window) & (query.tree >= 0)
        # Filling sees itself, because a softmax over no key at all would be NaN.
        return (seen | torch.eye(self.columns, dtype=torch.bool))[:, None].to(self.device)

    def additive(self, dtype: torch.dtype) -> Float[Tensor, "R 1 L L"]:
        """Return the mask as a dense tensor for eager attention, which adds it to the scores.

        Args:
            dtype: Type of the scores.

        Returns:
            0 where seen, the type's lowest number elsewhere.
        """
        dense = self.dense()
        return torch.zeros(dense.shape, dtype=dtype, device=dense.device).masked_fill(~dense, torch.finfo(dtype).min)

    def once(self, key: Any, make: Any) -> Any:
        """Return the cached value of a key, made on first use, so that all layers of a forward pass share it."""
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
    # The parameters are those of scaled_dot_product_attention, in its order.
    assert isinstance(attn_mask, TreeMask)
    assert not is_causal
    if dropout_p:
        raise ValueError(
            f"dropout_p={dropout_p}: attention dropout would differ between copies of a prompt; use the padded layout."
        )
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if query.device.type == "cuda":
        return _flex()(query, key, value, block_mask=attn_mask.once("block", lambda: _block_mask(attn_mask)), **options)
    pieces = [
        torch.cat(list(_row(query[r : r + 1], key[r : r + 1], value[r : r + 1], attn_mask, r, options)), dim=1)
        for r in range(query.shape[0])
    ]
    # Same memory order as SDPA's own results, (R, L, H, E): models transpose and flatten it without a copy.
    return torch.cat(pieces).transpose(1, 2)


def _row(
    query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, row: int, options: dict[str, Any]
) -> Iterator[Float[Tensor, "1 S H E"]]:
    """Yield the results of one row, piece by piece."""
    spans = [span for span in mask.spans if span.row == row]
    sizes = [span.length for span in spans]
    filling = mask.columns - sum(sizes)
    parts = [tensor.split([*sizes, filling], dim=2) for tensor in (query, key, value)]
    # strict=False: the parts end with the filling, which belongs to no span.
    for span, q, k, v in zip(spans, *parts, strict=False):
        yield from attend_in_tree(span, q, k, v, window=mask.window, once=mask.once, options=options)
    if filling:
        yield value.new_zeros(1, filling, query.shape[1], value.shape[-1])


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # dynamic: one compilation for all batch shapes, which differ at every step.
    return torch.compile(flex_attention, dynamic=True)


def _block_mask(mask: TreeMask) -> Any:
    """Return the rule of `visible` as a block mask for FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, columns = mask.shape[0], mask.columns
    places = Places(*(numbers.to(mask.device) for numbers in Places.of(mask.spans, shape=(rows, columns))))

    # A lambda, because FlexAttention requires exactly four plain arguments.
    sees = lambda row, head, q, k: visible(places.at(row, q), places.at(row, k), mask.window)  # noqa: E731
    return create_block_mask(sees, rows, None, columns, columns, device=str(mask.device))


def attend_in_tree(
    span: TreeSpan,
    q: Float[Tensor, "1 H S D"],
    k: Float[Tensor, "1 K S D"],
    v: Float[Tensor, "1 K S E"],
    *,
    window: int | None,
    once: Once,
    options: dict[str, Any],
) -> Iterator[Float[Tensor, "1 Q H E"]]:
    """Yield the attention output of one tree, in consecutive pieces.

    Args:
        span: The tree, of S tokens.
        q: Its queries.
        k: Its keys.
        v: Its values.
        window: As in :class:`falign.scoring.TreeMask`.
        once: Cache of biases for the other layers of a forward pass.
        options: Passed on to `scaled_dot_product_attention`.

    Yields:
        Consecutive parts of (1, S, H, E).
    """
    if window is not None and window < span.depth:
        calls = partial(_windowed, window=window)
    else:
        calls = _one_by_one if is_long(span) else _together
    for piece in calls(span, q, k, v, once, options):
        yield piece.transpose(1, 2)


def is_long(span: TreeSpan) -> bool:
    """Return True if each completion is worth its own call, with its own copy of the prompt's keys.

    One call for all completions computes sum(L) queries by P + sum(L) keys, of which each query needs only P + L. But
    each call has overhead, and the copies are kept for the backward pass, so separate calls must save a third.
    """
    lengths = span.completion_lengths
    together = sum(lengths) * span.length
    used = sum(length * (span.prompt_length + length) for length in lengths)
    return together - used > max(together / 3, LONG_COMPLETION**2 * len(lengths))


def _windowed(
    span: TreeSpan, q: Tensor, k: Tensor, v: Tensor, once: Once, options: dict[str, Any], *, window: int
) -> Iterator[Float[Tensor, "1 H Q E"]]:
    bias = once((span, "all", q.dtype), lambda: _bias(span, q, window=window))
    yield scaled_dot_product_attention(q, k, v, bias, **options)


def _together(
    span: TreeSpan, q: Tensor, k: Tensor, v: Tensor, once: Once, options: dict[str, Any]
) -> Iterator[Float[Tensor, "1 H Q E"]]:
    """One causal call for the prompt, and one masked call for all completions behind it."""
    p = span.prompt_length
    yield scaled_dot_product_attention(q[:, :, :p], k[:, :, :p], v[:, :, :p], is_causal=True, **options)
    bias = once((span, "completions", q.dtype), lambda: _bias(span, q, first=p))
    yield scaled_dot_product_attention(q[:, :, p:], k, v, bias, **options)


def _one_by_one(
    span: TreeSpan, q: Tensor, k: Tensor, v: Tensor, once: Once, options: dict[str, Any]
) -> Iterator[Float[Tensor, "1 H Q E"]]:
    """One call per completion; the prompt with its first completion is one plain causal sequence.

    Every other completion is attended behind a copy of the prompt's keys and values. A causal call skips the masked
    half, a call with a bias does not. So if the prompt is no longer than the completion, its queries are computed again
    in a causal call and dropped; otherwise a bias is cheaper.
    """
    p, (one, *others) = span.prompt_length, span.completion_lengths
    q1, k1, v1 = (tensor[:, :, : p + one] for tensor in (q, k, v))
    yield scaled_dot_product_attention(q1, k1, v1, is_causal=True, **options)
    start = p + one
    for length in others:
        own = slice(start, start + length)
        start += length
        key, value = (torch.cat((tensor[:, :, :p], tensor[:, :, own]), dim=2) for tensor in (k, v))
        if p <= length:
            query = torch.cat((q[:, :, :p], q[:, :, own]), dim=2)
            yield scaled_dot_product_attention(query, key, value, is_causal=True, **options)[:, :, p:]
        else:
            alone = replace(span, completion_lengths=(length,))
            # The bias depends only on both lengths, so all completions and trees of equal lengths share it.
            bias = once((p, length, q.dtype), lambda alone=alone: _bias(alone, q, first=p))
            yield scaled_dot_product_attention(q[:, :, own], key, value, bias, **options)


def _bias(span: TreeSpan, like: Tensor, *, first: int = 0, window: int | None = None) -> Float[Tensor, "1 1 Q S"]:
    # A float bias, because SDPA would convert a boolean mask again in every layer.
    seen = visible_in(span, window)[first:]
    return torch.zeros(seen.shape, dtype=like.dtype).masked_fill(~seen, -torch.inf)[None, None].to(like.device)
