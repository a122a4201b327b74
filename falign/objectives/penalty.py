"""The two parts of a policy gradient: the surrogate of its advantages, and the penalty ``β D_f(π‖π_ref)``.

The penalty alone, with a teacher as its reference, is distillation on the policy's own samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from falign.divergences import Divergence
from falign.divergences.estimators import loss_from_policy, loss_from_vocabulary, value_from_policy
from falign.divergences.powers import power
from falign.numeric_fields import NumericFields
from falign.objectives.base import CompletionBatch, Importance
from falign.objectives.batch import REFERENCE, field_of_reference
from falign.objectives.groups import groups_of, mean_of_others
from falign.objectives.measures import DivergenceTo, Measure

__all__ = ["Credit", "Level", "Penalty", "Surrogate", "SurrogateOutput"]


Level = Literal["sequence", "token", "vocabulary"]
Credit = Literal["fixed_prefix", "returns"]


@dataclass(frozen=True)
class Penalty(NumericFields):
    """A divergence penalty on samples of the policy, or of π_old with importance weights; never clipped.

    Attributes:
        divergence: f; at level ``"vocabulary"`` also any :class:`Measure`, in place of D_f.
        level: ``"sequence"``: ``D_f`` of whole completions. ``"token"``: ``Σ_t D_f(π(·|s_t)‖π_ref(·|s_t))`` on the
            policy's own prefixes, from the sampled tokens. ``"vocabulary"``: the same, with each summand computed
            over the full vocabulary. Sequence and token level agree only for the reverse KL.
        credit: Below sequence level, ``"fixed_prefix"`` treats the distribution of prefixes as fixed; ``"returns"``
            adds a token's effect on later prefixes.
        reference: Name of π_ref.
        temperature: At level ``"vocabulary"``, both distributions are computed from ``logits/T``.
        importance: ``"sequence"``: weights ``π/π_old`` of whole prefixes, exact. ``"token"``: of single tokens, below
            sequence level with fixed prefixes.

    Raises:
        ValueError: A choice is unknown, or has no effect or no meaning at this level.

    Source:
        :mod:`falign.divergences.estimators`.

    Example:
        >>> from falign import divergences
        >>> Penalty(divergences.get("jensen_shannon"), "token", reference="teacher").needs
        frozenset({'references.teacher'})
    """

    divergence: Divergence | Measure
    level: Level = "sequence"
    credit: Credit = "fixed_prefix"
    reference: str = REFERENCE
    temperature: float = 1.0
    importance: Importance = "sequence"

    def __post_init__(self) -> None:
        if self.level not in ("sequence", "token", "vocabulary"):
            raise ValueError(f"level={self.level!r}: choose 'sequence', 'token' or 'vocabulary'.")
        if self.credit not in ("fixed_prefix", "returns"):
            raise ValueError(f"credit={self.credit!r}: choose 'fixed_prefix' or 'returns'.")
        if self.level == "sequence" and self.credit == "returns":
            raise ValueError(
                "credit='returns' at level='sequence': a whole completion has no later prefixes; leave credit out, or "
                "set level='token' or 'vocabulary'."
            )
        if self.importance not in ("sequence", "token"):
            raise ValueError(f"importance={self.importance!r}: choose 'sequence' or 'token'.")
        if self.importance == "token" and (self.level == "sequence" or self.credit == "returns"):
            raise ValueError(
                f"importance='token' at level={self.level!r} with credit={self.credit!r}: whole prefixes are weighted "
                "there; leave importance out, or set level='token' or 'vocabulary' with credit='fixed_prefix'."
            )
        of_vocabulary = {"a measure": self._is_measure, f"temperature={self.temperature!r}": self.temperature != 1.0}
        for name, given in of_vocabulary.items():
            if given and self.level != "vocabulary":
                raise ValueError(
                    f"{name} at level={self.level!r}: it reads whole next-token distributions; set level='vocabulary'."
                )
        if self._is_measure and (self.reference != REFERENCE or self.temperature != 1.0):
            own = {"reference": (self.reference, REFERENCE), "temperature": (self.temperature, 1.0)}
            given = ", ".join(f"{name}={value!r}" for name, (value, default) in own.items() if value != default)
            raise ValueError(f"{given} with a measure, which has its own: give it to the measure.")
        _ = self.measures  # validates the temperature

    @property
    def _is_measure(self) -> bool:
        return isinstance(self.divergence, Measure)

    @property
    def needs(self) -> frozenset[str]:
        """The reference's log-probabilities; none with a measure. Level ``"vocabulary"`` only logs them."""
        return frozenset() if self._is_measure else frozenset({field_of_reference(self.reference)})

    @property
    def measures(self) -> dict[str, Measure]:
        """The divergence over the vocabulary at each token, at level ``"vocabulary"``; else empty."""
        if self.level != "vocabulary":
            return {}
        own = self.divergence
        measure = own if isinstance(own, Measure) else DivergenceTo(own, self.reference, self.temperature)
        return {"divergence": measure}

    @property
    def metric(self) -> str:
        """Name of :meth:`value` in metrics: ``divergence/NAME``, or ``measure``."""
        return "measure" if isinstance(self.divergence, Measure) else f"divergence/{self.divergence.name}"

    def baseline(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return, for each completion, the mean of ``f'(u)`` over the others of its prompt, 0 if there are none.

        Most of ``f'(u)`` is common to all completions of a prompt; subtracting it reduces the variance.

        Args:
            batch: The rollout, with the reference's log-probabilities.

        Returns:
            Shape (N,), without gradient.
        """
        log_ratio = batch.sequence_sum(batch.log_ratio_to(self.reference)).detach()
        return mean_of_others(self._f.f_prime(log_ratio), groups_of(batch.prompt_index))

    def loss(self, batch: CompletionBatch, token_weights: Float[Tensor, "N T"] | None = None) -> Float[Tensor, " N"]:
        """Return a surrogate whose gradient is ``∇D_f`` in expectation; its value means nothing.

        Args:
            batch: Completions with :attr:`needs` and :attr:`measures`, ``old_logprobs`` if they were sampled from
                π_old, and optionally ``baseline``.
            token_weights: Constant factor of each token's divergence, a function of its prefix, shape (N, T).

        Returns:
            One surrogate per completion, shape (N,).
        """
        if self.level == "vocabulary":
            return loss_from_vocabulary(
                batch.require("measures.divergence"),
                batch.logprobs,
                batch.completion_mask,
                credit=self.credit,
                old_logprobs=batch.old_logprobs,
                importance=self.importance,
                token_weights=token_weights,
            )
        return loss_from_policy(
            self._f,
            batch.logprobs,
            batch.require(field_of_reference(self.reference)),
            batch.completion_mask,
            level=self.level,
            credit=self.credit,
            old_logprobs=batch.old_logprobs,
            importance=self.importance,
            baseline=batch.baseline,
            token_weights=token_weights,
        )

    @torch.no_grad()
    def value(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        """Return an estimate of the divergence, one value per completion; never negative, unlike some measures.

        Args:
            batch: As for :meth:`loss`.

        Returns:
            Shape (N,); its expectation is ``D_f`` of the current policy.
        """
        if self.level == "vocabulary":
            return self.loss(batch)
        # Token t is weighted by π/π_old of its prefix, itself included; a whole completion by that of its last token.
        log_ratio, importance = batch.log_ratio_to(self.reference), batch.importance_log_ratio
        importance = importance if self.importance == "token" else importance.cumsum(dim=-1)
        if self.level == "sequence":
            log_ratio, importance = log_ratio.sum(dim=-1, keepdim=True), importance[:, -1:]
        # A product of two huge values overflows to infinity, which would make a mean over the batch useless. The bound
        # is small enough that even a sum over all tokens of the batch stays finite.
        largest = torch.finfo(log_ratio.dtype).max / max(log_ratio.numel(), 1)
        return (value_from_policy(self._f, log_ratio) * power(importance)).clamp(max=largest).sum(dim=-1)

    @property
    def _f(self) -> Divergence:
        assert not isinstance(self.divergence, Measure), "a measure has no f; __post_init__ refuses it at this level"
        return self.divergence


class SurrogateOutput(NamedTuple):
    """The output of a surrogate for a batch; every field is (N, T), and the last three are constants.

    Attributes:
        gains: Surrogate to maximize at each token; its gradient is the policy gradient, its value means nothing.
        importance_weight: ``π/π_old`` of the token, or of its whole completion.
        clipped_low: True where the lower bound makes the gradient 0.
        clipped_high: True where the upper bound makes the gradient 0.
    """

    gains: Float[Tensor, "N T"]
    importance_weight: Float[Tensor, "N T"]
    clipped_low: Bool[Tensor, "N T"]
    clipped_high: Bool[Tensor, "N T"]


@dataclass(frozen=True)
class Surrogate(NumericFields):
    """``min(w A, clip(w, 1 - ε_low, 1 + ε_high) A)`` at each token, with ``w = π/π_old``, or another ratio.

    Attributes:
        importance: ``"sequence"``: w is the product over the completion's tokens: unbiased on samples of π_old.
            ``"token"``: w is the token's own ratio, as in PPO; it ignores the change in the distribution of prefixes.
        clip_low: ``ε_low``, in (0, 1]; None means no lower bound.
        clip_high: ``ε_high``, positive; None means no upper bound.
        importance_reference: Name of a reference T that π is compared with too: ``w = π/(π_old^a T^(1-a))``.
        old_exponent: a, in [0, 1]; 1 is ``π/π_old``, and T is then not read.

    Raises:
        ValueError: A choice is unknown or a number is out of range, or ``old_exponent`` is given without
            ``importance_reference``.

    Source:
        Schulman et al., PPO (arXiv:1707.06347), Eq. 7; two bounds: Yu et al., DAPO (arXiv:2503.14476), Eq. 10; ratio
        to T: Zhang et al., RLAD (arXiv:2602.22495). Beyond 30 nats w continues as its tangent line, so that an overflow
        cannot turn into NaN.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0, -2.0]]),
        ...     old_logprobs=torch.tensor([[-2.0, -2.0]]),
        ...     completion_mask=torch.ones(1, 2, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0]),
        ...     advantages=torch.tensor([[0.5, 0.5]]),
        ... )
        >>> Surrogate("token", clip_high=0.25)(batch).gains  # e is above 1.25
        tensor([[0.6250, 0.5000]])
    """

    importance: Importance = "sequence"
    clip_low: float | None = None
    clip_high: float | None = None
    importance_reference: str | None = None
    old_exponent: float = 1.0

    def __post_init__(self) -> None:
        if self.importance not in ("sequence", "token"):
            raise ValueError(f"importance={self.importance!r}: choose 'sequence' or 'token'.")
        if self.clip_low is not None and not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low!r} must be in (0, 1]: π/π_old is kept above 1 - clip_low.")
        if self.clip_high is not None and not 0 < self.clip_high < math.inf:
            raise ValueError(
                f"clip_high={self.clip_high!r} must be positive and finite: π/π_old is kept below 1 + clip_high."
            )
        if not 0 <= self.old_exponent <= 1:
            raise ValueError(f"old_exponent={self.old_exponent!r} must be between 0 and 1.")
        if self.importance_reference is None and self.old_exponent != 1:
            raise ValueError(
                f"old_exponent={self.old_exponent!r} without importance_reference: set that to a reference, or leave "
                "old_exponent out."
            )

    @property
    def needs(self) -> frozenset[str]:
        """Its log-probabilities, if they are read."""
        if self.importance_reference is None or self.old_exponent == 1:
            return frozenset()
        return frozenset(
            {
                "reference_logprobs"
                if self.importance_reference == "reference"
                else f"references.{self.importance_reference}"
            }
        )

    def log_ratio(self, batch: CompletionBatch) -> Float[Tensor, "N T"]:
        """Return ``log w = log π - a log π_old - (1 - a) log T`` of each token, 0 outside the mask."""
        log_ratio = batch.importance_log_ratio
        for name in self.needs:  # at most one
            gap = (batch.sampling_logprobs - batch.require(name)).masked_fill(~batch.completion_mask, 0.0)
            log_ratio = log_ratio + (1 - self.old_exponent) * gap
        return log_ratio

    @property
    def clips(self) -> bool:
        """True if there is a bound."""
        return self.clip_low is not None or self.clip_high is not None

    def __call__(self, batch: CompletionBatch) -> SurrogateOutput:
        """Return the surrogate at each token.

        Args:
            batch: Completions with ``advantages``, and ``old_logprobs`` unless they were sampled from π itself.

        Returns:
            The gains and the clipped tokens; 0 and False outside the mask.

        Raises:
            ValueError: ``advantages`` is None, or ``old_logprobs`` is None and there are bounds.
        """
        if self.clips and batch.old_logprobs is None:
            raise ValueError(
                f"clip_low={self.clip_low!r}, clip_high={self.clip_high!r} bound π/π_old, and "
                "CompletionBatch.old_logprobs is None: set it to the log-probs before the first update, or leave the "
                "clips out."
            )
        mask, advantages = batch.completion_mask, batch.require("advantages").masked_fill(~batch.completion_mask, 0.0)
        log_ratio = self.log_ratio(batch)
        if self.importance == "token":
            weight = power(log_ratio)
        else:
            logprobs = batch.logprobs.masked_fill(~mask, 0.0)
            # The weight is a constant; the factor is 1 in value and has the gradient of the token's own log π. Summed
            # over tokens this is the gradient of the completion's weight, and advantages may differ between tokens.
            whole = power(log_ratio.detach().sum(dim=-1, keepdim=True))
            weight = whole * (1 + logprobs - logprobs.detach())
        gains = weight * advantages
        if self.clips:
            low = None if self.clip_low is None else 1 - self.clip_low
            high = None if self.clip_high is None else 1 + self.clip_high
            # The minimum clips only what would move the policy further away; a clamped weight has no gradient.
            gains = torch.minimum(gains, weight.clamp(low, high) * advantages)
        constant, nothing = weight.detach(), torch.zeros_like(mask)
        below = nothing if self.clip_low is None else mask & (constant < 1 - self.clip_low) & (advantages < 0)
        above = nothing if self.clip_high is None else mask & (constant > 1 + self.clip_high) & (advantages > 0)
        return SurrogateOutput(gains, constant.masked_fill(~mask, 0.0), below, above)
