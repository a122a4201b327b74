"""Token weights from whole next-token distributions: entropy gates, and filters that keep the largest values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from falign.divergences import Divergence
from falign.divergences.estimators import full_vocabulary
from falign.numeric_fields import NumericFields
from falign.objectives.batch import CompletionBatch
from falign.objectives.measures import Entropy, Measure, get_measure
from falign.objectives.vocabulary import Vocabulary

__all__ = [
    "DivergenceBetween",
    "EntropyGap",
    "EntropyGate",
    "EntropyPrefix",
    "FirstTokens",
    "QuantileFilter",
    "ReferenceEntropy",
    "quantile_filter",
]


@dataclass(frozen=True)
class ReferenceEntropy:
    """``-Σ_v π_k(v) log π_k(v)`` of a reference at each position, a constant.

    Attributes:
        reference: Name of the reference π_k.

    Example:
        >>> half = torch.tensor([[0.5, 0.5]]).log()
        >>> at = Vocabulary(half, targets=torch.tensor([0]), references={"teacher": half})
        >>> ReferenceEntropy("teacher")(at)  # log 2
        tensor([0.6931])
    """

    reference: str = "reference"

    @property
    def references(self) -> frozenset[str]:
        """The name of the reference."""
        return frozenset({self.reference})

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the reference's entropy at each position.

        Args:
            at: M positions.

        Returns:
            Shape (M,), nats, not negative.
        """
        return Entropy()(Vocabulary(at.reference(self.reference), at.targets))


@dataclass(frozen=True)
class DivergenceBetween:
    """``D_f(π_j‖π_k)`` of two references at each position, a constant.

    Attributes:
        divergence: Any f.
        of: Name of π_j, which stands where the policy stands in :class:`DivergenceTo`.
        to: Name of π_k.

    Source:
        :func:`falign.divergences.estimators.full_vocabulary`.

    Example:
        >>> from falign.divergences import TotalVariation
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> at = Vocabulary(p, targets=torch.tensor([0]), references={"draft": p, "teacher": q})
        >>> DivergenceBetween(TotalVariation(), "draft", "teacher")(at)
        tensor([0.2500])
    """

    divergence: Divergence
    of: str
    to: str

    @property
    def references(self) -> frozenset[str]:
        """The names of both references."""
        return frozenset({self.of, self.to})

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the divergence at each position.

        Args:
            at: M positions.

        Returns:
            Shape (M,), not negative.
        """
        return full_vocabulary(self.divergence, at.reference(self.of), at.reference(self.to))


def _entropies(reference: str) -> dict[str, Measure]:
    return {"entropy": Entropy(), f"entropy_{reference}": ReferenceEntropy(reference)}


@dataclass(frozen=True)
class FirstTokens(NumericFields):
    """1 at the first ``tokens`` tokens of each completion, else 0: a horizon, which a schedule may let grow.

    Attributes:
        tokens: Number of tokens that count, at least 1.

    Raises:
        ValueError: ``tokens`` is less than 1.

    Source:
        Wang et al., TCOD (arXiv:2604.24005): f2b, with tokens in place of turns.
    """

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"first_tokens: tokens={self.tokens!r} must be at least 1.")

    @property
    def needs(self) -> frozenset[str]:
        """Empty."""
        return frozenset()

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Empty."""
        return {}

    def __call__(self, batch: CompletionBatch) -> Float[Tensor, "N T"]:
        """Return which tokens count.

        Args:
            batch: Completions.

        Returns:
            Shape (N, T).
        """
        return (batch.completion_mask.cumsum(dim=-1) <= self.tokens).to(batch.logprobs.dtype)


@dataclass(frozen=True)
class EntropyGate(NumericFields):
    """1 at tokens where one of two distributions has the higher entropy, else ``other``.

    Two gates with the two choices of ``higher`` divide the tokens: where both entropies are equal, the policy's counts
    as higher.

    Attributes:
        higher: ``"reference"`` opens the gate where the reference's entropy is higher, ``"policy"`` where the policy's
            is.
        reference: Name of the reference.
        other: Weight of all other tokens, from 0 to 1.

    Raises:
        ValueError: A choice is unknown, or ``other`` is out of range.

    Source:
        BD-KD, balanced divergence for distillation: the forward KL where the teacher's entropy is higher, the reverse
        KL elsewhere.
    """

    higher: Literal["reference", "policy"]
    reference: str = "teacher"
    other: float = 0.0

    def __post_init__(self) -> None:
        if self.higher not in ("reference", "policy"):
            raise ValueError(f"entropy_gate: higher={self.higher!r}: choose 'reference' or 'policy'.")
        if not 0 <= self.other <= 1:
            raise ValueError(f"entropy_gate: other={self.other!r} must be between 0 and 1.")

    @property
    def needs(self) -> frozenset[str]:
        """Empty."""
        return frozenset()

    @property
    def measures(self) -> Mapping[str, Measure]:
        """The entropies of policy and reference."""
        return _entropies(self.reference)

    def __call__(self, batch: CompletionBatch) -> Float[Tensor, "N T"]:
        """Return the gate at each token.

        Args:
            batch: Completions with :attr:`measures`.

        Returns:
            Shape (N, T), of 1 and ``other``.
        """
        policy, reference = (batch.require(f"measures.{name}").detach() for name in self.measures)
        is_open = reference > policy if self.higher == "reference" else reference <= policy
        return torch.where(is_open, 1.0, self.other)


@dataclass(frozen=True)
class EntropyGap:
    """``σ(H(π) - H(π_k))`` at each token: more weight where the policy is less certain than a reference.

    Attributes:
        reference: Name of the reference π_k.

    Source:
        Kim and Baek, TSD-KD (arXiv:2603.13260), as in its code.
    """

    reference: str = "teacher"

    @property
    def needs(self) -> frozenset[str]:
        """Empty."""
        return frozenset()

    @property
    def measures(self) -> Mapping[str, Measure]:
        """The entropies of policy and reference."""
        return _entropies(self.reference)

    def __call__(self, batch: CompletionBatch) -> Float[Tensor, "N T"]:
        """Return the weight of each token.

        Args:
            batch: Completions with :attr:`measures`.

        Returns:
            Shape (N, T), between 0 and 1.
        """
        policy, reference = (batch.require(f"measures.{name}").detach() for name in self.measures)
        return torch.sigmoid(policy - reference)


@dataclass(frozen=True)
class EntropyPrefix(NumericFields):
    """1 at the first tokens of a completion, until they hold a share of the entropy of all its tokens; then 0.

    The token with which the sum reaches the share is the last one that counts; the first token always counts.

    Attributes:
        share: Share of the sum of entropies, in (0, 1]; 1 keeps every token.

    Raises:
        ValueError: The share is out of range.

    Source:
        Kim and Baek, TSD-KD (arXiv:2603.13260), which ranks in the early uncertain part of a completion. In its code
        one length is computed over the flattened batch; here each completion has its own.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"entropy_prefix: share={self.share!r} must be above 0 and at most 1.")

    @property
    def needs(self) -> frozenset[str]:
        """Empty."""
        return frozenset()

    @property
    def measures(self) -> Mapping[str, Measure]:
        """The policy's entropy."""
        return {"entropy": Entropy()}

    def __call__(self, batch: CompletionBatch) -> Float[Tensor, "N T"]:
        """Return 1 on the prefix of each completion.

        Args:
            batch: Completions with :attr:`measures`.

        Returns:
            Shape (N, T), of 1 and 0.
        """
        entropy = batch.require("measures.entropy").detach().masked_fill(~batch.completion_mask, 0.0)
        before = entropy.cumsum(dim=-1) - entropy
        reached = before >= self.share * entropy.sum(dim=-1, keepdim=True)
        first = batch.completion_mask.cumsum(dim=-1) == 1
        kept = ~reached | first if self.share < 1 else torch.ones_like(reached)
        return kept.to(entropy.dtype)


@dataclass(frozen=True)
class QuantileFilter(NumericFields):
    """Keep the share of a completion's tokens with the largest scores; the loss becomes a mean over kept tokens.

    The score is a measure, or the difference of two. Kept are the tokens with ``score ≥ quantile(1 - keep)``, with
    linear interpolation between the completion's sorted scores; ties at the threshold all stay. A kept token of a
    completion of n tokens, of which m are kept, has the weight n/m: then Σ over kept / m is the completion's weighted
    mean over its n tokens, and the denominators of a step are known before its first forward pass.

    The unit is one completion. A quantile over a batch would change with the size of micro-batches.

    Attributes:
        measure: The score.
        keep: Share of tokens to keep, in (0, 1]; 1 weights every token with exactly 1.
        minus: Subtracted from the score; None for nothing.
        name: Name of the measure in the batch; filters with different measures in one list need different names.

    Raises:
        ValueError: ``keep`` is out of range.

    Source:
        AdaSPEC keeps the tokens with the largest ``KL(T‖S) - KL(T‖draft)``, by a quantile over the batch. TSD-KD
        (arXiv:2603.13260) names a share of 0.1 for its entropy term, but its code takes the quantile 0.1, which keeps
        90 % of the tokens, and counts positions of prompt and padding.
    """

    measure: Measure
    keep: float
    minus: Measure | None = None
    name: str = "score"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(
                f"quantile_filter: keep={self.keep!r} must be above 0 and at most 1; it is the share of tokens to keep."
            )

    @property
    def needs(self) -> frozenset[str]:
        """Empty."""
        return frozenset()

    @property
    def measures(self) -> Mapping[str, Measure]:
        """The score, and what is subtracted from it."""
        return {self.name: self.measure} | ({} if self.minus is None else {f"{self.name}_minus": self.minus})

    def __call__(self, batch: CompletionBatch) -> Float[Tensor, "N T"]:
        """Return n/m on kept tokens.

        Args:
            batch: Completions with :attr:`measures`.

        Returns:
            Shape (N, T), 0 on the other tokens.
        """
        mask, num_tokens = batch.completion_mask, batch.num_tokens
        parts = [batch.require(f"measures.{name}").detach() for name in self.measures]
        scores = parts[0] if len(parts) == 1 else parts[0] - parts[1]
        # Sorted with padding last. The quantile lies between two neighbors of the completion's sorted scores, and what
        # is not below it is not below the upper one. The small number undoes the rounding of 1 - keep.
        place = ((1 - self.keep) * (num_tokens - 1).double() - 1e-9).ceil().long().clamp(min=0)
        threshold = scores.masked_fill(~mask, math.inf).sort(dim=-1).values.gather(-1, place[:, None])
        kept = (scores >= threshold) & mask
        weight = num_tokens.to(scores.dtype) / kept.sum(dim=-1).clamp(min=1)
        return kept * weight[:, None]


def quantile_filter(measure: str, keep: float, *, minus: str | None = None, name: str = "score") -> QuantileFilter:
    """Keep the share of a completion's tokens with the largest scores, as a mean over the kept ones.

    Args:
        measure: The score: a measure such as ``entropy`` or ``divergence_to(forward_kl, teacher)``.
        keep: Share of tokens to keep, above 0 and at most 1.
        minus: A measure to subtract, such as ``divergence_between(forward_kl, reference, teacher)``.
        name: Name in the batch; filters with different measures in one list need different names.

    Returns:
        A :class:`QuantileFilter`.

    Raises:
        ValueError: A measure is unknown, or ``keep`` is out of range.

    Example:
        >>> quantile_filter("entropy", 0.1)
        QuantileFilter(measure=Entropy(), keep=0.1, minus=None, name='score')
    """
    return QuantileFilter(get_measure(measure), keep, None if minus is None else get_measure(minus), name)
