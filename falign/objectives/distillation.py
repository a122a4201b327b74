"""Distillation: a divergence between the policy and a teacher, on given completions or on the policy's own samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from typing_extensions import override

from falign.divergences import Divergence, ReverseKL
from falign.objectives.base import BaseObjective, CompletionBatch, Importance, ObjectiveOutput
from falign.objectives.batch import REFERENCE
from falign.objectives.groups import CompletionMean, completion_mean_at, completion_term
from falign.objectives.measures import Measure
from falign.objectives.penalty import Credit, Level, Penalty
from falign.objectives.weights import (
    TokenWeight,
    check_weights,
    measures_of_weights,
    merge_measures,
    needs_of_weights,
    token_factor,
)

__all__ = ["TEACHER", "Distillation"]

TEACHER = "teacher"
"""Name of the reference that a policy is distilled from, by default."""


@dataclass(frozen=True)
class Distillation(BaseObjective):
    """Minimize ``D_f(π‖π_T)`` to a teacher π_T, or any measure; no rewards are read.

    What it can learn from follows from the estimator:

    ==============  ====================  ========================================================================
    level           completions from      loss of a completion
    ==============  ====================  ========================================================================
    ``vocabulary``  anywhere              ``Σ_t D_f(π(·|s_t)‖π_T(·|s_t))`` on their prefixes: the measure itself
    ``vocabulary``  the policy, or π_old  the same, with weights ``π/π_old`` of prefixes
    ``token``       the policy, or π_old  ``Σ_t sg(f'(u_t)) log π(y_t|s_t)``: the same gradient from sampled tokens
    ``sequence``    the policy, or π_old  ``sg(f'(u)) log π(y)``: the gradient of ``D_f`` of whole completions
    ==============  ====================  ========================================================================

    At sequence level under the reverse KL, the teacher may be known up to a factor per prompt, as the geometric
    combination ``π_b^{1-λ} π_T^λ`` of whole completions is; the metric then is not the divergence.

    The forward KL is ``KL(π_T‖π)``, the reverse KL ``KL(π‖π_T)``. On samples of the teacher whose log-probabilities are
    known, but not its whole distributions, the loss is that of :class:`Rehearsal` with ``reference="teacher"``.

    Attributes:
        divergence: f; at level ``"vocabulary"`` also any :class:`Measure`.
        reference: Name of the teacher among the references; ``"teacher"`` by default. None with a measure, which names
            its own.
        level: ``"vocabulary"``, ``"token"`` or ``"sequence"``; see the table.
        credit: On the policy's samples below sequence level, ``"fixed_prefix"`` treats the distribution of prefixes as
            fixed; ``"returns"`` adds a token's effect on later prefixes.
        temperature: At level ``"vocabulary"``, both distributions are computed from ``logits/T``.
        importance: Unit of ``π/π_old``: ``"sequence"`` weights whole prefixes, which is exact; ``"token"`` single
            tokens.
        weights: Factors of each token's loss (:class:`TokenWeight`), multiplied; below sequence level with fixed
            prefixes. With any, the metric of the divergence stays unweighted.
        reduction: See :func:`completion_term`; ``"token_mean"`` by default. At sequence level there is one loss per
            completion, and the reduction is ``"sequence_sum"``.

    Raises:
        ValueError: A choice is unknown, or has no effect or no meaning with the others.

    Source:
        Agarwal et al., GKD (arXiv:2306.13649), Eq. 3, is level ``"vocabulary"`` with fixed prefixes, for three
        divergences; their JSD(β) is ``generalized_js`` up to a factor. Score functions as in
        :mod:`falign.divergences.estimators`.

    Example:
        >>> from falign import divergences
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0, -2.0]], requires_grad=True),
        ...     references={"teacher": torch.tensor([[-1.5, -1.0]])},
        ...     completion_mask=torch.ones(1, 2, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0]),
        ... )
        >>> Distillation(divergences.get("reverse_kl"), level="token")(batch).mean().backward()
        >>> batch.logprobs.grad  # log u of each token, of two
        tensor([[ 0.2500, -0.5000]])
    """

    divergence: Divergence | Measure
    reference: str | None = None
    level: Level = "vocabulary"
    credit: Credit = "fixed_prefix"
    temperature: float = 1.0
    importance: Importance = "sequence"
    reduction: CompletionMean | None = None
    weights: Sequence[TokenWeight] = ()

    def __post_init__(self) -> None:
        if isinstance(self.divergence, Measure):
            if self.reference is not None:
                raise ValueError(f"reference={self.reference!r} with a measure, which names its own: leave it out.")
        elif self.reference is None:
            object.__setattr__(self, "reference", TEACHER)
        reduction = completion_mean_at(self.level, self.reduction, others="'vocabulary' or 'token'")
        object.__setattr__(self, "reduction", reduction)
        check_weights(self.weights)
        _ = self.measures  # validates the other fields
        if self.weights and (self.level == "sequence" or self.credit == "returns"):
            raise ValueError(
                f"weights at level={self.level!r} with credit={self.credit!r}: they weight the divergence at single "
                "prefixes; set level='vocabulary' or 'token' with credit='fixed_prefix'."
            )

    @cached_property
    def _penalty(self) -> Penalty:
        reference = REFERENCE if self.reference is None else self.reference
        return Penalty(self.divergence, self.level, self.credit, reference, self.temperature, self.importance)

    @property
    @override
    def reads_row_weights(self) -> bool:
        return True

    @property
    @override
    def needs(self) -> frozenset[str]:
        # A batch without old_logprobs was sampled from π itself, or its prefixes are given. Where only the former would
        # be right, they are needed, and a run on given completions is refused.
        if self.level == "vocabulary":
            own = frozenset() if self.credit == "fixed_prefix" else frozenset({"old_logprobs"})
        else:
            own = self._penalty.needs | {"old_logprobs"}
        return own | needs_of_weights(self.weights)

    @property
    @override
    def measures(self) -> Mapping[str, Measure]:
        return merge_measures(self._penalty.measures, measures_of_weights(self.weights))

    @property
    @override
    def rests_at(self) -> str | None:
        return self.reference  # None with a measure, whose gradient need not be zero there

    @property
    @override
    def learns_from_samples(self) -> bool:
        return True

    @property
    @override
    def accepts_unnormalized(self) -> bool:
        # f' is log u there, to which an unknown normalizer adds a constant per prompt, and E[∇log π] = 0.
        return self.level == "sequence" and self.divergence == ReverseKL()

    @property
    @override
    def correction_level(self) -> Importance:
        return self.importance

    @override
    def prepare(self, batch: CompletionBatch) -> CompletionBatch:
        """Return the rollout with ``baseline`` at sequence level: the mean of f' over the other samples of the prompt.

        Args:
            batch: The whole rollout before its first update, with :attr:`needs`.

        Returns:
            The same completions.

        Raises:
            ValueError: A needed field is None.
        """
        return replace(batch, baseline=self._penalty.baseline(batch)) if self.level == "sequence" else batch

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per completion.

        Args:
            batch: Completions with :attr:`needs` and :attr:`measures`. ``old_logprobs`` are read where present: without
                them the completions were sampled from π itself, or are given.

        Returns:
            One term of shape (N,), and metrics of each completion: ``divergence/<name>`` (an estimate of the
            divergence, summed over tokens; ``measure`` for a measure), ``nll`` (mean over tokens of ``-log π``), with
            weights ``token_weight`` (their mean over tokens), and below level ``"vocabulary"`` ``logratios/<teacher>``
            (``log u`` of the whole).

        Raises:
            ValueError: A needed field is None.
        """
        assert self.reduction is not None
        if self.level == "sequence" and batch.baseline is None:
            batch = self.prepare(batch)
        factor = token_factor(self.weights, batch) if self.weights else None
        losses = self._penalty.loss(batch, factor)
        with torch.no_grad():
            metrics = {
                self._penalty.metric: self._penalty.value(batch),
                "nll": -batch.sequence_sum(batch.logprobs) / batch.num_tokens,
            }
            if factor is not None:
                metrics["token_weight"] = batch.sequence_sum(factor) / batch.num_tokens
            if self.reference is not None and self.level != "vocabulary":
                metrics[f"logratios/{self.reference}"] = batch.sequence_sum(batch.log_ratio_to(self.reference))
        term = completion_term(losses, batch.num_tokens, self.reduction, name="distillation")
        term = term._replace(weights=batch.weighted(term.weights))
        return ObjectiveOutput((term,), {name: each.detach() for name, each in metrics.items()})
