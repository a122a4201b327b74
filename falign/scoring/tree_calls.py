"""Who sees whom in a prompt tree, and the attention calls that compute just that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from falign.scoring.batch import TreeSpan

__all__ = ["attend_in_tree", "sees"]

LONG_COMPLETION = 64  # so many queries by as many keys cost more than a call and what it copies

Once = Callable[[Any, Callable[[], Tensor]], Tensor]


def sees(span: TreeSpan, window: int | None) -> Bool[Tensor, "S S"]:
    """The visibility rule of one tree, written once; everything else is a way to compute with it."""
    branch = torch.zeros(span.length, dtype=torch.long)
    position = torch.arange(span.length)
    begin = span.prompt_length
    for number, length in enumerate(span.completion_lengths, start=1):
        branch[begin : begin + length] = number
        position[begin : begin + length] = span.prompt_length + torch.arange(length)
        begin += length
    distance = position[:, None] - position[None, :]
    seen = ((branch == 0)[None, :] | (branch[:, None] == branch[None, :])) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


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
    """Yield what the tokens of one tree attend to, piece by piece in their order.

    Args:
        span: The tree, of S tokens.
        q: Its queries.
        k: Its keys.
        v: Its values.
        window: As that of :class:`falign.scoring.TreeMask`.
        once: Keeps biases for the other layers of a forward pass.
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
    """Whether completions are long enough for a call, and a copy of the prompt's keys, each.

    All in one call are sum(L) queries by P + sum(L) keys, of which each uses P + L. A call takes some time of its own,
    and the copies are kept for the backward pass: a third of the work has to be saved.
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
    """The prompt sees itself; the completions see it and themselves. No one else needs a mask's worth of zeros."""
    p = span.prompt_length
    yield scaled_dot_product_attention(q[:, :, :p], k[:, :, :p], v[:, :, :p], is_causal=True, **options)
    bias = once((span, "completions", q.dtype), lambda: _bias(span, q, first=p))
    yield scaled_dot_product_attention(q[:, :, p:], k, v, bias, **options)


def _one_by_one(
    span: TreeSpan, q: Tensor, k: Tensor, v: Tensor, once: Once, options: dict[str, Any]
) -> Iterator[Float[Tensor, "1 H Q E"]]:
    """The prompt with its first completion is a plain sequence; behind a copy of the prompt, so is every other one.

    A causal call skips the half that nobody sees, a call with a mask does not: where the prompt is the shorter part,
    its queries are computed again for that.
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
            bias = once((p, length, q.dtype), lambda alone=alone: _bias(alone, q, first=p))
            yield scaled_dot_product_attention(q[:, :, own], key, value, bias, **options)


def _bias(span: TreeSpan, like: Tensor, *, first: int = 0, window: int | None = None) -> Float[Tensor, "1 1 Q S"]:
    seen = sees(span, window)[first:]
    return torch.zeros(seen.shape, dtype=like.dtype).masked_fill(~seen, -torch.inf)[None, None].to(like.device)
