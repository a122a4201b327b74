"""Denominators for per-completion losses."""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Int, Shaped
from torch import Tensor

from falign.divergences.dtypes import numbers
from falign.objectives.base import Term

__all__ = ["CompletionMean", "check_completion_mean", "completion_term"]

CompletionMean = Literal["sequence_sum", "sequence_mean", "token_mean"]


def check_completion_mean(reduction: str) -> None:
    """Refuse a reduction that does not exist.

    Raises:
        ValueError: It is not one of the three.
    """
    if reduction not in get_args(CompletionMean):
        raise ValueError(f"reduction={reduction!r}: choose one of {', '.join(get_args(CompletionMean))}.")


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
