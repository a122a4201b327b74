"""Decoding with a cache: prompts are read once and continued token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from typing_extensions import override

from falign.errors import RolloutError
from falign.rollouts.base import SamplingParams
from falign.scoring import read_backbone, read_head

__all__ = ["Decoding", "DrawnTokens", "RoomyLayer", "draw", "process_logits", "spread", "uniform_streams"]


class Decoding:
    """Rows of tokens that grow at their right end; short prompts are padded at their left.

    The model's parts are called as in scoring: the backbone with positions counted from each prompt's first token, and
    the head only on the last position. Padding is masked by position, never by value.

    Args:
        model: A causal language model in evaluation mode, with or without adapters.
        prompts: Token ids of each prompt; read in one pass.
        owners: The prompt of each row to continue, as an index into `prompts`.
        room: Maximum number of tokens that will be appended.
        pad_token_id: Id that pads short prompts; any valid id.

    Raises:
        RolloutError: The model returns no cache of keys and values.
    """

    logits: Float[Tensor, "B V"]

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        owners: Sequence[int],
        *,
        room: int,
        pad_token_id: int,
    ) -> None:
        self._backbone, self._head = read_backbone(model), read_head(model)
        device = next(model.parameters()).device
        longest = max(map(len, prompts))
        filled = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._mask = torch.ones(len(prompts), longest + room, dtype=torch.long, device=device)
        # Positions in each prompt; negative where it is padded.
        columns = torch.arange(longest, device=device) - (longest - lengths)[:, None]
        self._mask[:, :longest] = columns >= 0
        self._width, self._positions = longest, lengths
        outputs = self._backbone(
            input_ids=torch.tensor(filled, device=device),
            position_ids=columns.clamp(min=0),
            attention_mask=self._mask[:, :longest],
            use_cache=True,
        )
        cache = getattr(outputs, "past_key_values", None)
        if not isinstance(cache, Cache):
            raise RolloutError(
                f"{type(self._backbone).__name__} returns no cache of keys and values, so every token would read its "
                "whole prefix again: sample from a model with use_cache."
            )
        self._cache = cache
        self.logits = self._read(outputs[0])
        self._room = room
        self._choose(torch.tensor(owners, device=device))

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only some of the rows.

        Args:
            rows: Indices of the rows to keep.
        """
        self._choose(torch.tensor(rows, device=self._mask.device))

    def append(self, token_ids: Int[Tensor, " B"]) -> None:
        """Append one token to each row; `logits` then predict the next one.

        Args:
            token_ids: Shape (B,).
        """
        self._width += 1
        outputs = self._backbone(
            input_ids=token_ids[:, None],
            position_ids=self._positions[:, None],
            attention_mask=self._mask[:, : self._width],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._positions = self._positions + 1
        self._room -= 1
        self.logits = self._read(outputs[0])

    def _read(self, states: Float[Tensor, "B L H"]) -> Float[Tensor, "B V"]:
        # Two dimensions: a slice of three makes torch expand a frozen head once per row.
        return self._head.logits(self._head.embeddings(states[:, -1].contiguous()))

    def _choose(self, rows: Int[Tensor, " B"]) -> None:
        spread(self._cache, rows, room=self._room)
        self._mask, self._positions, self.logits = self._mask[rows], self._positions[rows], self.logits[rows]


def spread(cache: Cache, rows: Tensor, *, room: int) -> None:
    """Replace the rows of a cache in place by the given rows, which may repeat.

    Args:
        cache: A model's cache after it has read the prompts.
        rows: Indices of rows, shape (B,).
        room: Number of tokens that will be appended.
    """
    for i, layer in enumerate(cache.layers):
        # Layers with windows or recurrent states are small and keep their own implementation.
        if type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer(layer, rows, room=room)
        else:
            layer.reorder_cache(rows)  # pyright: ignore[reportArgumentType]


class RoomyLayer(DynamicLayer):
    """A cache layer that appends tokens in preallocated memory; its parent copies all tokens each time."""

    def __init__(self, layer: DynamicLayer, rows: Tensor, *, room: int) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self._width = layer.keys.shape[-2]
        self._capacity = self._width + room
        self._take(layer.keys, layer.values, rows)

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self._width = self._width, self._width + key_states.shape[-2]
        self._all_keys[:, :, start : self._width] = key_states
        self._all_values[:, :, start : self._width] = value_states
        return self._show()

    @override
    def reorder_cache(self, beam_idx: Tensor) -> None:
        assert self.keys is not None
        assert self.values is not None
        self._take(self.keys, self.values, beam_idx)

    def _take(self, keys: Tensor, values: Tensor, rows: Tensor) -> None:
        self._all_keys, self._all_values = self._with_room(keys, rows), self._with_room(values, rows)
        self._show()

    def _with_room(self, states: Tensor, rows: Tensor) -> Tensor:
        _, heads, width, size = states.shape
        roomy = states.new_empty(len(rows), heads, self._capacity, size)
        roomy[:, :, :width] = states[rows]
        return roomy

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._all_keys[:, :, : self._width], self._all_values[:, :, : self._width]
        return self.keys, self.values


_STREAMS = 1_000_003  # streams of different seeds do not overlap before this many rows


class DrawnTokens(NamedTuple):
    """One token per row.

    Attributes:
        token_ids: The drawn ids, shape (B,).
        logprobs: Their log-probabilities, nats, shape (B,); NaN if the logits are NaN or infinite.
    """

    token_ids: Int[Tensor, " B"]
    logprobs: Float[Tensor, " B"]


def process_logits(logits: Float[Tensor, "B V"], params: SamplingParams) -> Float[Tensor, "B V"]:
    """Return the logits to sample from: divided by the temperature, and -inf outside top-k and top-p.

    Args:
        logits: The model's, shape (B, V).
        params: Its temperature is above 0.

    Returns:
        Shape (B, V), in the type of `logits`.
    """
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        last_kept = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last_kept, -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1, dtype=torch.float64)
        # A token is dropped if the likelier ones already have the mass, so the likeliest token always stays.
        outside = probabilities.cumsum(dim=-1) - probabilities >= params.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return logits


def draw(logits: Float[Tensor, "B V"], params: SamplingParams, uniforms: Float[Tensor, " B"]) -> DrawnTokens:
    """Draw a token per row by inverting the cumulative distribution.

    Args:
        logits: The model's, shape (B, V).
        params: How to draw.
        uniforms: One number in [0, 1) per row, float64, shape (B,); not read when decoding greedily.

    Returns:
        The tokens and their log-probabilities under the processed distribution.
    """
    if params.temperature == 0:
        peak = logits.max(dim=-1)
        return DrawnTokens(peak.indices, peak.values - peak.values)  # 0, or NaN if the logits are not finite
    logits = process_logits(logits, params)
    shifted = logits - logits.max(dim=-1, keepdim=True).values
    # float64, because V rounding errors of a float32 sum would distort the tail.
    cumulative = shifted.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # The first token with a cumulative sum above the target: never a token of probability 0.
    token_ids = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True).clamp(max=logits.shape[-1] - 1)
    logprobs = shifted.gather(-1, token_ids) - total.log()
    return DrawnTokens(token_ids[:, 0], logprobs[:, 0])


def uniform_streams(rows: list[int], count: int, *, seed: int | list[int]) -> Float[Tensor, "B T"]:
    """Return random numbers in [0, 1); each row has its own stream, independent of the other rows.

    Args:
        rows: Indices of the streams in the whole call.
        count: Numbers per stream; a larger count begins with the same numbers.
        seed: Seed of the call, or one per row.

    Returns:
        float64 on the CPU, shape (B, T).
    """
    generator = torch.Generator()
    each = [seed] * len(rows) if isinstance(seed, int) else seed
    seeds = [(own * _STREAMS + row) % 2**63 for own, row in zip(each, rows, strict=True)]
    streams = [torch.rand(count, generator=generator.manual_seed(stream), dtype=torch.float64) for stream in seeds]
    # Below 1 even after rounding: a product equal to the total would select no token.
    return torch.stack(streams) * (1 - 2**-52)
