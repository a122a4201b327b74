"""Divergences over the most likely tokens of a reference, which need no more of it than these tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from falign.divergences import Divergence
from falign.divergences.estimators import full_vocabulary
from falign.numeric_fields import NumericFields
from falign.objectives.vocabulary import TopTokens, Vocabulary, log_rest

__all__ = ["Tail", "TopK"]

Tail = Literal["bucket", "none", "renormalized"]
"""How :class:`TopK` treats the tokens outside the top: as one event, not at all, or as impossible."""


@dataclass(frozen=True)
class TopK(NumericFields):
    """``D_f`` over the k most likely tokens S of the reference π_k, at each position.

    With ``P = Σ_{v∈S} π(v)`` and ``Q = Σ_{v∈S} π_k(v)``::

        tail="bucket"        Σ_{v∈S} π_k(v) f(π(v)/π_k(v)) + (1-Q) f((1-P)/(1-Q))
        tail="renormalized"  Σ_{v∈S} π_k(v)/Q f(π(v)Q / (π_k(v)P))
        tail="none"          Σ_{v∈S} π_k(v) f(π(v)/π_k(v)) - c (P - Q)

    The first is a divergence: that of the distributions in which all other tokens are one. It is a lower bound of the
    whole divergence. The second is that of the distributions given S; the mass that π has outside S is free. The third
    is a partial sum, as published code has it. Which multiple c of ``u - 1`` is subtracted from f does not matter for
    whole distributions, and does here: c = 1 turns the forward KL into ``Σ_S π_k log(π_k/π)`` and c = -1 the reverse
    KL into ``Σ_S π log(π/π_k)``, as they are usually written. With c = 0 the sum is not negative; otherwise it can be,
    and then it is lowest where π is not π_k.

    With k = V all three are the divergence over the whole vocabulary.

    Attributes:
        divergence: Any f.
        k: Number of tokens, from 1 to V.
        reference: Name of the reference π_k.
        tail: The treatment of all other tokens.
        linear: c; only with ``tail="none"``.
        stray: λ ≥ 0, the factor of an added ``Σ_{v ∈ top_m(π) ∖ S} π(v)``: the mass of those of the policy's m most
            likely tokens that are not in S. Its gradient is that of the mass, with the set of tokens fixed.
        stray_top: m; by default k.
        temperature: T, positive: both distributions are computed from ``logits/T``. Other than 1 it needs the
            reference's whole distribution.

    Raises:
        ValueError: A number is out of range, or is given where it has no effect.

    Source:
        The constraint on stray mass, with the forward KL, ``tail="none"`` and ``linear=1``: STAR, constrained knowledge
        distillation (arXiv:2602.03022), with k = 100 and λ = 10.

    Example:
        >>> from falign import divergences
        >>> p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.6, 0.3]])
        >>> at = Vocabulary(p.log(), targets=torch.tensor([0]), references={"teacher": q.log()})
        >>> TopK(divergences.get("total_variation"), k=1, reference="teacher")(at)  # (0.3, 0.7) and (0.6, 0.4)
        tensor([0.3000])
    """

    divergence: Divergence
    k: int
    reference: str = "reference"
    tail: Tail = "bucket"
    linear: float = 0.0
    stray: float = 0.0
    stray_top: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k!r} must be at least 1.")
        if self.tail not in get_args(Tail):
            raise ValueError(f"tail={self.tail!r}: choose one of {', '.join(get_args(Tail))}.")
        if self.linear and self.tail != "none":
            raise ValueError(f"linear={self.linear!r} has no effect with tail={self.tail!r}: leave it out.")
        if not math.isfinite(self.linear):
            raise ValueError(f"linear={self.linear!r} must be finite.")
        if not 0 <= self.stray < math.inf:
            raise ValueError(f"stray={self.stray!r} must be at least 0 and finite.")
        if self.stray_top is not None and not (self.stray and self.stray_top >= 1):
            raise ValueError(
                f"stray_top={self.stray_top!r} must be at least 1, and stray positive: it counts its tokens."
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be positive and finite.")

    @property
    def references(self) -> frozenset[str]:
        """The name of the reference."""
        return frozenset({self.reference})

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the divergence at each position.

        Args:
            at: M positions.

        Returns:
            Shape (M,).
        """
        policy = at.logprobs
        whole = self.k == policy.shape[-1]
        if self.temperature == 1.0:
            top, rest = at.top(self.reference, self.k), None if whole else at.rest(self.reference, self.k)
        else:
            policy, reference = (
                each.div(self.temperature).log_softmax(dim=-1) for each in (policy, at.reference(self.reference))
            )
            top = TopTokens.of(reference, self.k)
            rest = None if whole else log_rest(reference, top.ids)
        p, q = policy.gather(-1, top.ids), top.logprobs
        if rest is None:
            value = full_vocabulary(self.divergence, p, q)
        elif self.tail == "bucket":
            tail = log_rest(policy, top.ids)
            value = full_vocabulary(self.divergence, _appended(p, tail), _appended(q, rest))
        elif self.tail == "renormalized":
            value = full_vocabulary(self.divergence, p.log_softmax(dim=-1), q.log_softmax(dim=-1))
        else:
            value = full_vocabulary(self.divergence, p, q)
            if self.linear:
                value = value - self.linear * (p.exp() - q.exp()).sum(dim=-1)
        return value + self.stray * self._stray_mass(policy, top.ids) if self.stray and not whole else value

    def _stray_mass(self, policy: Tensor, ids: Tensor) -> Tensor:
        count = self.k if self.stray_top is None else self.stray_top
        own = TopTokens.of(policy.detach(), count).ids
        in_top = torch.zeros_like(policy, dtype=torch.bool).scatter_(-1, ids, True)
        return policy.gather(-1, own).exp().masked_fill(in_top.gather(-1, own), 0.0).sum(dim=-1)


def _appended(logprobs: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([logprobs, rest[:, None]], dim=-1)
