"""Means of metrics over many batches and all processes, exact whatever the batches' sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from falign.training.processes import gathered

__all__ = ["Means"]

LARGEST = "_max"
"""Ending of the names of metrics of which the largest value is asked for, not the mean."""


class Means:
    """Sums and counts of metrics that come as one value per item, until they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one batch; each tensor holds one value per item, and those without any are left out."""
        for name, given in metrics.items():
            if not given.numel():
                continue
            values = given.detach().double()
            if name.endswith(LARGEST):
                largest = values.max()
                self._sums[name] = torch.maximum(self._sums.get(name, largest), largest)
                self._counts[name] = 1
            else:
                total = values.sum()
                self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + total
                self._counts[name] = self._counts.get(name, 0) + values.numel()

    def take(self) -> dict[str, float]:
        """Return the means of all processes since the last call, and start again; all of them have to call it."""
        own = [(name, total.item(), self._counts[name]) for name, total in self._sums.items()]
        self._sums, self._counts = {}, {}
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for name, total, count in gathered(own):
            if name.endswith(LARGEST):
                sums[name], counts[name] = max(sums.get(name, total), total), 1
            else:
                sums[name], counts[name] = sums.get(name, 0.0) + total, counts.get(name, 0) + count
        return {name: total / counts[name] for name, total in sums.items()}

    def state_dict(self) -> dict[str, list[float]]:
        """Return plain values that :meth:`load_state_dict` takes: sum and count of each metric."""
        return {name: [total.item(), float(self._counts[name])] for name, total in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]], device: torch.device) -> None:
        """Go on from a state."""
        self._sums = {
            name: torch.tensor(total, dtype=torch.double, device=device) for name, (total, _) in state.items()
        }
        self._counts = {name: int(count) for name, (_, count) in state.items()}
