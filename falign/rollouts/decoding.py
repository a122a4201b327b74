"""Decoding with a cache: prompts are read once and continued token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from typing_extensions import override

from falign.errors import RolloutError
from falign.scoring import read_backbone, read_head

__all__ = ["Decoding", "RoomyLayer", "spread"]


class Decoding:
    """Rows of tokens that grow at their right end; short prompts are padded at their left.

    The model's parts are called as in scoring: the backbone with positions counted from each prompt's first token, and
    the head only on the last position. Padding is masked by position, never by value.

    Args:
        model: A causal language model in evaluation mode, with or without adapters.
        prompts: Token ids of each prompt; read in one pass.
        owners: The prompt of each row to continue, as an index into `prompts`.
        room: Largest number of tokens that will be appended.
        pad_token_id: Id of the filling of short prompts; any valid id.

    Raises:
        RolloutError: The model keeps no cache of keys and values.
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
                "whole prefix anew: sample from a model with use_cache."
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
