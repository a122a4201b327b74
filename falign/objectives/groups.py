"""Completions by prompt: groups, pairs, and the denominators of means over completions."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from falign.divergences.base import numbers
from falign.objectives.base import CompletionBatch, Term

__all__ = [
    "CompletionMean",
    "Groups",
    "accuracies",
    "check_completion_mean",
    "completion_mean_at",
    "completion_term",
    "groups_of",
    "largest",
    "logsumexp_of_others",
    "mean_of_others",
    "pairs_in",
    "pairs_of",
    "smallest",
    "total",
]


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
    # Sorted by group, a completion's column is its position minus that of the first of its group.
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


def largest(values: Shaped[Tensor, " N"], groups: Groups) -> Float[Tensor, " N"]:
    """Return, for each completion, the largest value in its group."""
    return -smallest(-numbers(values, "values"), groups)


def mean_of_others(values: Shaped[Tensor, " N"], groups: Groups) -> Float[Tensor, " N"]:
    """Return, for each completion, the mean over the others of its group, or 0 if there are no others.

    The completion's own value is left out of the sum, not subtracted from it: rounding cannot leave a trace of it.
    """
    table = groups.table(values, 0.0)
    # Sums over the columns before and after each one: shift by one column, then accumulate from that side.
    before = F.pad(table, (1, 0))[:, :-1].cumsum(dim=-1)
    after = F.pad(table, (0, 1))[:, 1:].flip(-1).cumsum(dim=-1).flip(-1)
    return (before + after)[groups.row, groups.column] / (groups.size - 1).clamp(min=1)


def logsumexp_of_others(values: Shaped[Tensor, " N"], groups: Groups) -> Float[Tensor, " N"]:
    """Return, for each completion, ``log Σ exp`` over the others of its group, or -inf if there are no others."""
    table = groups.table(values, -torch.inf)
    # As in mean_of_others, from both sides, because a difference of sums would lose small terms beside a large one.
    before = F.pad(table, (1, 0), value=-torch.inf)[:, :-1].logcumsumexp(dim=-1)
    after = F.pad(table, (0, 1), value=-torch.inf)[:, 1:].flip(-1).logcumsumexp(dim=-1).flip(-1)
    return torch.logaddexp(before, after)[groups.row, groups.column]


CompletionMean = Literal["sequence_sum", "sequence_mean", "token_mean"]


def check_completion_mean(reduction: str) -> None:
    """Refuse a reduction that does not exist.

    Raises:
        ValueError: It is not one of the three.
    """
    if reduction not in get_args(CompletionMean):
        raise ValueError(f"reduction={reduction!r}: choose one of {', '.join(get_args(CompletionMean))}.")


def completion_mean_at(level: str, reduction: CompletionMean | None, *, others: str = "'token'") -> CompletionMean:
    """Return the mean over completions at a level, by default that which suits it.

    Args:
        level: At ``"sequence"`` the loss is of a whole completion, and not a sum over its tokens.
        reduction: The given mean; None for ``"sequence_sum"`` at sequence level and ``"token_mean"`` below it.
        others: The other levels, for messages.

    Raises:
        ValueError: The mean does not exist, or divides the loss of a whole completion by its length.

    Example:
        >>> completion_mean_at("sequence", None), completion_mean_at("token", None)
        ('sequence_sum', 'token_mean')
    """
    suits: CompletionMean = "sequence_sum" if level == "sequence" else "token_mean"
    if reduction is None:
        return suits
    check_completion_mean(reduction)
    if level == "sequence" and reduction != suits:
        raise ValueError(
            f"reduction={reduction!r} at level='sequence': the loss of a whole completion is not a sum over tokens; "
            f"leave reduction out, or set level={others}."
        )
    return reduction


def completion_term(
    sums: Shaped[Tensor, " N"],
    num_tokens: Int[Tensor, " N"],
    reduction: CompletionMean,
    scale: float = 1.0,
    *,
    name: str = "loss",
) -> Term:
    """Return the mean over completions of a loss that is a sum over tokens.

    Args:
        sums: The loss of each completion, summed over its tokens, shape (N,).
        num_tokens: Number of tokens of each completion, shape (N,).
        reduction: ``"sequence_sum"``: the mean over completions of the sums, an expectation under the policy.
            ``"sequence_mean"``: the mean over completions of their means over tokens, so that a token of a long
            completion counts less (GRPO). ``"token_mean"``: the sum over all tokens divided by their number (DAPO).
        scale: Factor of the term.
        name: Name of the term.

    Returns:
        The term, with losses of shape (N,).

    Source:
        Shao et al., GRPO (arXiv:2402.03300), Eq. 3; Yu et al., DAPO (arXiv:2503.14476), Eq. 12.

    Example:
        >>> sums, lengths = torch.tensor([2.0, 8.0]), torch.tensor([1, 4])
        >>> for reduction in ("sequence_sum", "sequence_mean", "token_mean"):
        ...     losses, weights, *_ = completion_term(sums, lengths, reduction)
        ...     print((losses * weights).sum() / weights.sum())
        tensor(5.)
        tensor(2.)
        tensor(2.)
    """
    sums = numbers(sums, "sums")
    lengths = num_tokens.to(sums.dtype)
    if reduction == "sequence_sum":
        return Term(sums, lengths.new_ones(lengths.shape), scale, name)
    per_token = sums / lengths.clamp(min=1.0)
    weights = lengths if reduction == "token_mean" else lengths.new_ones(lengths.shape)
    return Term(per_token, weights, scale, name)


ROUNDING = 1e-6  # relative size up to which a margin counts as a tie


def pairs_of(
    preference: Shaped[Tensor, " N"], prompt_index: Int[Tensor, " N"]
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Return the indices of the chosen and the rejected completion of every pair, in row-major order.

    Args:
        preference: Larger is preferred, shape (N,).
        prompt_index: Which prompt, shape (N,).

    Returns:
        Two index tensors of shape (P,).

    Raises:
        ValueError: A preference is NaN, which cannot be compared.

    Example:
        >>> pairs_of(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1]))
        (tensor([0, 3]), tensor([1, 2]))
    """
    if (missing := preference.isnan()).any():
        raise ValueError(f"preference[{int(missing.nonzero()[0])}] is NaN; leave that completion out.")
    better = preference[:, None] > preference[None, :]
    chosen, rejected = torch.nonzero(better & (prompt_index[:, None] == prompt_index[None, :]), as_tuple=True)
    return chosen, rejected


def pairs_in(batch: CompletionBatch) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Return the pairs of a batch; see :func:`pairs_of`.

    Args:
        batch: Completions with ``preference``.

    Returns:
        Two index tensors of shape (P,), P at least 1.

    Raises:
        ValueError: ``preference`` is None, or no two completions of one prompt differ in it.
    """
    chosen, rejected = pairs_of(batch.require("preference"), batch.prompt_index)
    if len(chosen) == 0:
        raise ValueError("The batch has no pair: no two completions of one prompt differ in preference.")
    return chosen, rejected


def accuracies(margin: Shaped[Tensor, "*S"], size: Shaped[Tensor, "*S"] | float = 0.0) -> Float[Tensor, "*S"]:
    """Return 1 where the margin is positive, 0 where it is negative, and ½ at a tie.

    Args:
        margin: Reward of the chosen minus that of the rejected side, any shape.
        size: Largest absolute reward of the two sides, which sets the rounding error of the margin; same shape.

    Returns:
        The same shape; a margin within ``1e-6 (1 + size)`` is a tie; NaN stays NaN.

    Example:
        >>> accuracies(torch.tensor([3.0, 0.0, 1e-8, -1.0]))
        tensor([1.0000, 0.5000, 0.5000, 0.0000])
    """
    # If the policy equals the reference, both rewards are 0 up to rounding, because log-probs come from different
    # batches or a cache. Counting the sign of that rounding error would look like a real accuracy.
    margin = numbers(margin, "margin")
    tie = margin.abs() <= ROUNDING * (1 + size)
    result = torch.where(tie, torch.zeros_like(margin), torch.sign(margin)).add(1) / 2
    return result.masked_fill(margin.isnan(), torch.nan)
