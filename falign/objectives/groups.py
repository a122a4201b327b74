"""Groups of completions of one prompt: sums over a group, and over the other completions in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from falign.divergences.dtypes import numbers

__all__ = ["Groups", "groups_of", "logsumexp_of_others", "mean_of_others", "smallest", "total"]


class Groups(NamedTuple):
    """The place of each completion in a table with one row per group; every field is (N,).

    Attributes:
        row: Index of the group.
        column: Index within the group.
        size: Number of completions in the group, itself included.
    """

    row: Int[Tensor, " N"]
    column: Int[Tensor, " N"]
    size: Int[Tensor, " N"]

    def table(self, values: Shaped[Tensor, " N"], fill: float) -> Float[Tensor, "G n"]:
        """Return the values as one row per group, with short groups padded on the right."""
        shape = (int(self.row.max()) + 1, int(self.size.max())) if len(values) else (0, 0)
        values = numbers(values, "values")
        return values.new_full(shape, fill).index_put((self.row, self.column), values)


def groups_of(prompt_index: Int[Tensor, " N"]) -> Groups:
    """Return the groups of equal values; completions may come in any order.

    Args:
        prompt_index: Which prompt, shape (N,).

    Returns:
        The place of each completion.

    Example:
        >>> groups_of(torch.tensor([7, 3, 7])).size
        tensor([2, 1, 2])
    """
    _, row, counts = torch.unique(prompt_index, return_inverse=True, return_counts=True)
    order = torch.argsort(row, stable=True)
    first = counts.cumsum(0) - counts
    places = torch.arange(len(row), device=row.device) - first[row[order]]
    return Groups(row, torch.empty_like(row).index_put((order,), places), counts[row])


def total(values: Shaped[Tensor, " N"], groups: Groups) -> Float[Tensor, " N"]:
    """Return, for each completion, the sum over its group."""
    return groups.table(values, 0.0).sum(dim=-1)[groups.row]


def smallest(values: Shaped[Tensor, " N"], groups: Groups) -> Float[Tensor, " N"]:
    """Return, for each completion, the smallest value in its group."""
    if len(values) == 0:
        return numbers(values, "values")
    return groups.table(values, torch.inf).amin(dim=-1)[groups.row]


def mean_of_others(values: Shaped[Tensor, " N"], groups: Groups) -> Float[Tensor, " N"]:
    """Return, for each completion, the mean over the others of its group, or 0 if there are no others.

    The completion's own value is left out of the sum, not subtracted from it: rounding cannot leave a trace of it.
    """
    table = groups.table(values, 0.0)
    before = F.pad(table, (1, 0))[:, :-1].cumsum(dim=-1)
    after = F.pad(table, (0, 1))[:, 1:].flip(-1).cumsum(dim=-1).flip(-1)
    return (before + after)[groups.row, groups.column] / (groups.size - 1).clamp(min=1)


def logsumexp_of_others(values: Shaped[Tensor, " N"], groups: Groups) -> Float[Tensor, " N"]:
    """Return, for each completion, ``log Σ exp`` over the others of its group, or -inf if there are no others."""
    table = groups.table(values, -torch.inf)
    before = F.pad(table, (1, 0), value=-torch.inf)[:, :-1].logcumsumexp(dim=-1)
    after = F.pad(table, (0, 1), value=-torch.inf)[:, 1:].flip(-1).logcumsumexp(dim=-1).flip(-1)
    return torch.logaddexp(before, after)[groups.row, groups.column]
