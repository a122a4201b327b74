"""A measure of order: how likely the policy is to rank the likeliest tokens as a reference does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from falign.numeric_fields import NumericFields
from falign.objectives.vocabulary import TopTokens, Vocabulary, log_rest

__all__ = ["RankTopK", "RankWeights"]

RankWeights = Literal["equal", "reference"]
"""Weights of the choices of :class:`RankTopK`: all 1, or the reference's probability of the chosen token."""


@dataclass(frozen=True)
class RankTopK(NumericFields):
    """``-Σ_i w_i log P(σ_i is chosen before σ_{i+1}, ..., σ_k)``: Plackett–Luce of the reference's order, per position.

    With the reference's k most likely tokens ``σ_1, ..., σ_k``, most likely first, and the policy's logits z::

        Σ_i w_i [ logsumexp_{j ≥ i} z(σ_j) - z(σ_i) ]

    The sums go over the *suffix* ``j ≥ i``, the tokens that are still to be ranked. A prefix sum in their place is the
    likelihood of the reversed order. With equal weights the value is the negative log-likelihood of the order, and
    ``exp(-value)`` sums to 1 over the k! orders.

    Attributes:
        k: Number of tokens, from 1 to V.
        reference: Name of the reference.
        weights: ``"equal"``: ``w_i = 1``. ``"reference"``: ``w_i = π_k(σ_i)``.
        target_first: Put the token of the data first, before the others in the reference's order.
        whole: Rank the k tokens before all others of the vocabulary, too: these are in every sum. Without it only the
            order among the k tokens matters, and with k = 1 nothing does.
        candidates: Whose k most likely tokens are ranked: ``"reference"``, or ``"policy"``; the order is always the
            reference's.

    Raises:
        ValueError: A number or choice is out of range.

    Source:
        Plackett–Luce: Luce, Individual Choice Behavior (1959). PLD (arXiv:2506.12542) has ``k = V``, the true label
        first and the reference's weights. TSD-KD (arXiv:2603.13260) ranks the student's top 10 with equal weights; its
        published code has prefix sums.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.6, 0.3]])
        >>> at = Vocabulary(p.log(), targets=torch.tensor([0]), references={"reference": q.log()})
        >>> RankTopK(2)(at).neg().exp()  # of tokens 1 and 2, 1 is chosen first
        tensor([0.6000])
    """

    k: int
    reference: str = "reference"
    weights: RankWeights = "equal"
    target_first: bool = False
    whole: bool = False
    candidates: Literal["reference", "policy"] = "reference"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k!r} must be at least 1.")
        if self.weights not in get_args(RankWeights):
            raise ValueError(f"weights={self.weights!r}: choose one of {', '.join(get_args(RankWeights))}.")
        if self.candidates not in ("reference", "policy"):
            raise ValueError(f"candidates={self.candidates!r}: choose 'reference' or 'policy'.")
        if self.k == 1 and not (self.whole or self.target_first):
            raise ValueError("k=1 ranks one token among itself: raise k, or set whole or target_first.")

    @property
    def references(self) -> frozenset[str]:
        """The name of the reference."""
        return frozenset({self.reference})

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the weighted negative log-likelihood of the reference's order at each position.

        Args:
            at: M positions.

        Returns:
            Shape (M,), not negative.
        """
        ids, weights = self._order(at)
        scores = at.logprobs.gather(-1, ids)  # logits up to a constant, which cancels
        ranked = torch.ones_like(ids, dtype=torch.bool)
        if self.target_first:
            # The target may be among the tokens: then its later place is left out of the order.
            ranked[:, 1:] = ids[:, 1:] != ids[:, :1]
        to_rank = scores.masked_fill(~ranked, -1e4)
        if self.whole and ids.shape[-1] < at.logprobs.shape[-1]:
            to_rank = torch.cat([to_rank, log_rest(at.logprobs, ids)[:, None]], dim=-1)
        remaining = to_rank.flip(-1).logcumsumexp(dim=-1).flip(-1)[:, : ids.shape[-1]]
        # At most 0 by rounding where a token has all of the remaining probability.
        return (weights * (remaining - scores).clamp(min=0.0)).masked_fill(~ranked, 0.0).sum(dim=-1)

    def _order(self, at: Vocabulary) -> tuple[Tensor, Tensor]:
        """Return the ids in the wanted order, and the weights of the choices, each of shape (M, K)."""
        ids, weights = self._candidates(at)
        if self.target_first:
            # From the whole distribution, because the target may not be among the top.
            first = at.targets[:, None]
            ids = torch.cat([first, ids], dim=-1)
            if self.weights == "reference":
                weights = torch.cat([at.reference(self.reference).gather(-1, first).exp(), weights], dim=-1)
        return ids, weights if self.weights == "reference" else torch.ones_like(ids, dtype=at.logprobs.dtype)

    def _candidates(self, at: Vocabulary) -> tuple[Tensor, Tensor]:
        """Return the ids to rank, best first, and the reference's probabilities of them."""
        if self.candidates == "reference":
            top = at.top(self.reference, self.k)
            return top.ids, top.logprobs.exp()
        own = TopTokens.of(at.logprobs.detach(), self.k).ids
        ranked = at.reference(self.reference).gather(-1, own).sort(dim=-1, descending=True, stable=True)
        return own.gather(-1, ranked.indices), ranked.values.exp()
