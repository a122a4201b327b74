"""Means of metrics over many batches, exact whatever the batches' sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Means"]


class Means:
    """Sums and counts of metrics that come as one value per item, until they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one batch; each tensor holds one value per item."""
        for name, values in metrics.items():
            total = values.detach().double().sum()
            self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + total
            self._counts[name] = self._counts.get(name, 0) + values.numel()

    def take(self) -> dict[str, float]:
        """Return the means since the last call, and start again."""
        means = {name: (total / self._counts[name]).item() for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, list[float]]:
        """Return plain values that :meth:`load_state_dict` takes: sum and count of each metric."""
        return {name: [total.item(), float(self._counts[name])] for name, total in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]], device: torch.device) -> None:
        """Go on from a state."""
        self._sums = {
            name: torch.tensor(total, dtype=torch.double, device=device) for name, (total, _) in state.items()
        }
        self._counts = {name: int(count) for name, (_, count) in state.items()}
