"""Transforms of both sides of a measure before it compares them: standardized logits, and a split at the target."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from falign.divergences import Divergence
from falign.divergences.estimators import full_vocabulary
from falign.numeric_fields import NumericFields
from falign.objectives.measures import Measure, block_of
from falign.objectives.vocabulary import Vocabulary, log_rest

__all__ = ["Standardized", "TargetPart", "TargetSplit"]

TargetPart = Literal["binary", "likelihood"]
"""The first part of :class:`TargetSplit`: a divergence of two events, or a weighted log-likelihood."""


@dataclass(frozen=True)
class Standardized(NumericFields):
    """Any measure of distributions that are computed from standardized logits, ``softmax((z - mean z) / (std z · T))``.

    The policy's logits and those of each reference that the measure reads are standardized at each position, over the
    vocabulary. So a student need not match the range of a teacher's logits, only their shape.

    Attributes:
        measure: The measure of the new distributions.
        temperature: T, positive.

    Raises:
        ValueError: The temperature is not positive and finite.

    Source:
        Sun et al., Logit Standardization in Knowledge Distillation (arXiv:2403.01681), with the divergence
        ``forward_kl``; std with the divisor V - 1 and 1e-7 added, as published. Its value is not multiplied by T².

    Example:
        >>> from falign.objectives.measures import DivergenceTo, Entropy
        >>> z = torch.tensor([[3.0, 0.0, 0.0]])
        >>> at = Vocabulary(z.log_softmax(-1), torch.tensor([0]))
        >>> at_half = Vocabulary((z / 2).log_softmax(-1), torch.tensor([0]))
        >>> bool(torch.isclose(Standardized(Entropy())(at), Standardized(Entropy())(at_half)))
        True
    """

    measure: Measure
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be positive and finite.")

    @property
    def references(self) -> frozenset[str]:
        """Those of the measure."""
        return self.measure.references

    @property
    def block(self) -> int:
        """Number of positions that the measure mixes, 1 for most."""
        return block_of(self.measure)

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the measure of the standardized distributions at each position.

        Args:
            at: M positions.

        Returns:
            Shape (M,).
        """
        logits = self._standardized(at.logprobs)
        log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
        references = {name: self._standardized(at.reference(name)).log_softmax(dim=-1) for name in self.references}
        return self.measure(
            replace(at, logprobs=logits - log_normalizer, references=references, log_normalizer=log_normalizer)
        )

    def _standardized(self, logprobs: Tensor) -> Tensor:
        # Logits and log-probabilities differ by a constant, which the mean takes away. A token of probability 0 would
        # have an infinite standard deviation.
        logprobs = logprobs.clamp(min=-1e4)
        centered = logprobs - logprobs.mean(dim=-1, keepdim=True)
        return centered / ((logprobs.std(dim=-1, keepdim=True) + 1e-7) * self.temperature)


@dataclass(frozen=True)
class TargetSplit(NumericFields):
    """``a D_f(binary) + b D_f(others)``: the target against all other tokens, and these among themselves.

    With the token y of the data, the reference π_k, and ``π̂(v) = π(v)/(1-π(y))`` over ``v ≠ y``::

        binary = D_f of (π(y), 1-π(y)) to (π_k(y), 1-π_k(y))
        others = D_f of π̂ to π̂_k

    For the forward KL the chain rule gives the whole divergence as ``binary + (1-π_k(y)) others``: where the reference
    is sure of the target, it teaches little about the others. The split gives these a weight of their own.

    Attributes:
        divergence: Any f.
        reference: Name of the reference.
        target_weight: a, at least 0.
        others_weight: b, at least 0.
        temperature: T, positive: all distributions are computed from ``logits/T``.
        target_part: ``"likelihood"`` has ``-π_k(y) log π(y)`` at temperature 1 in place of the binary divergence.

    Raises:
        ValueError: A number is out of range, or both weights are 0.

    Source:
        Zhao et al., decoupled knowledge distillation, DKD (arXiv:2203.08679), with ``forward_kl``, a = 1, b = 8, T = 4
        (without its factor T²). Yang et al., NKD (arXiv:2303.13005), with ``target_part="likelihood"``, and its γλ² as
        b, λ as T; its second part is a cross-entropy, which differs from the divergence by a constant.

    Example:
        >>> from falign import divergences
        >>> p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.48, 0.32]])
        >>> at = Vocabulary(p.log(), torch.tensor([0]), {"reference": q.log()})
        >>> TargetSplit(divergences.get("forward_kl"))(at)  # the others agree: only the binary part is left
        tensor([0.1927])
    """

    divergence: Divergence
    reference: str = "reference"
    target_weight: float = 1.0
    others_weight: float = 1.0
    temperature: float = 1.0
    target_part: TargetPart = "binary"

    def __post_init__(self) -> None:
        for name in ("target_weight", "others_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 0 and finite.")
        if not (self.target_weight or self.others_weight):
            raise ValueError("target_weight=0 and others_weight=0 leave nothing to measure: raise one of them.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be positive and finite.")
        if self.target_part not in get_args(TargetPart):
            raise ValueError(f"target_part={self.target_part!r}: choose one of {', '.join(get_args(TargetPart))}.")

    @property
    def references(self) -> frozenset[str]:
        """The name of the reference."""
        return frozenset({self.reference})

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the weighted sum of both parts at each position.

        Args:
            at: M positions.

        Returns:
            Shape (M,), not negative.
        """
        target = at.targets[:, None]
        policy, reference = at.logprobs, at.reference(self.reference)
        likelihood = None
        if self.target_part == "likelihood":
            likelihood = -(reference.gather(-1, target).exp() * policy.gather(-1, target))[:, 0]
        if self.temperature != 1.0:
            policy, reference = (each.div(self.temperature).log_softmax(dim=-1) for each in (policy, reference))
        rests = log_rest(policy, target)[:, None], log_rest(reference, target)[:, None]
        if likelihood is None:
            pairs = (
                torch.cat([each.gather(-1, target), rest], dim=-1)
                for each, rest in zip((policy, reference), rests, strict=True)
            )
            likelihood = full_vocabulary(self.divergence, *pairs)
        # The target has probability 0 on both sides, which contributes nothing.
        others = (
            (each - rest).scatter(-1, target, -torch.inf) for each, rest in zip((policy, reference), rests, strict=True)
        )
        return self.target_weight * likelihood + self.others_weight * full_vocabulary(self.divergence, *others)
