"""Keys and values of what has been read, in memory that is taken once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from typing_extensions import override

__all__ = ["RoomyLayer", "spread"]


def spread(cache: Cache, rows: Tensor, *, room: int) -> None:
    """Replace the rows of a cache by those chosen, each as often as it is named, in place.

    Args:
        cache: A model's, after it has read the prompts.
        rows: Indices of rows, shape (B,).
        room: Tokens that will come behind those that are there.
    """
    for i, layer in enumerate(cache.layers):
        # Layers that forget, by windows or by recurrence, are small, and keep their own ways.
        if type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer(layer, rows, room=room)
        else:
            layer.reorder_cache(rows)  # pyright: ignore[reportArgumentType]


class RoomyLayer(DynamicLayer):
    """A layer that writes a further token beside those before it, where its parent copies them all."""

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
