"""SequenceMatch: χ² matching of occupancies, with the logits as Q values; without a backspace token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from falign.objectives.base import BaseObjective, CompletionBatch, ObjectiveOutput, PreferenceKind, Term
from falign.objectives.groups import completion_term
from falign.objectives.measures import Measure
from falign.objectives.vocabulary import Vocabulary

__all__ = ["LogNormalizer", "SequenceMatching"]


@dataclass(frozen=True)
class LogNormalizer:
    """``logsumexp`` of the policy's logits at each position, the value ``V(s)`` of soft Q-learning; differentiable.

    Example:
        >>> at = Vocabulary(
        ...     torch.tensor([[0.5, 0.5]]).log(), targets=torch.tensor([0]), log_normalizer=torch.tensor([[3.0]])
        ... )
        >>> LogNormalizer()(at)
        tensor([3.])
    """

    @property
    def references(self) -> frozenset[str]:
        """Empty: no reference is read."""
        return frozenset()

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the value at each position.

        Args:
            at: M positions, with ``log_normalizer``.

        Returns:
            Shape (M,), nats.

        Raises:
            ValueError: ``log_normalizer`` is None.
        """
        if at.log_normalizer is None:
            raise ValueError(
                "LogNormalizer needs Vocabulary.log_normalizer, which is None: pass logsumexp of the logits."
            )
        return at.log_normalizer.squeeze(-1)


@dataclass(frozen=True)
class SequenceMatching(BaseObjective):
    """``-E_data[φ(Q_t - γ V_{t+1})] + ½ E_data[V_t - γ V_{t+1}] + ½ E_model[V_t - γ V_{t+1}]``, means over tokens.

    ``Q_t`` is the raw logit of token t, ``V_t = logsumexp Q(·|s_t)`` and ``φ(x) = x - x²/(4α)``. Completions whose
    ``preference`` is positive are the data, the others samples of the model. After the last token ``V = 0``: a state
    without rewards that is never left. Only logits are read: no reference and no rewards.

    Left out of the paper's method: the backspace token, which needs a new token and edited data; the value of the state
    after the end, which needs logits there; and fresh samples of the model in each step, in place of which the data
    have them.

    Attributes:
        alpha: α, positive; φ turns over at ``x = 2α``.
        gamma: γ, discount per token, in (0, 1].

    Raises:
        ValueError: α is not positive, or γ is out of range.

    Source:
        Cundy and Ermon, SequenceMatch (arXiv:2306.05426), the χ² mixture objective; its constants could not be
        confirmed.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0, -1.0]]),
        ...     measures={"value": torch.tensor([[1.0, 2.0]])},
        ...     completion_mask=torch.ones(1, 2, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0]),
        ...     preference=torch.tensor([1.0]),
        ... )
        >>> SequenceMatching(alpha=1.0, gamma=0.5)(batch).mean()  # mean of -φ(0 - 1) + ½(1 - 1) and -φ(1) + ½ · 2
        tensor(0.7500)
    """

    alpha: float = 0.5
    gamma: float = 0.998

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha!r} must be positive and finite.")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma!r} must be in (0, 1].")

    @property
    @override
    def reads_row_weights(self) -> bool:
        return True

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"preference"})

    @property
    @override
    def measures(self) -> Mapping[str, Measure]:
        return {"value": LogNormalizer()}

    @property
    @override
    def preference_kinds(self) -> frozenset[PreferenceKind]:
        return frozenset({"labels"})

    @override
    def label_remark(self, desirable: int, undesirable: int) -> str | None:
        if desirable and undesirable:
            return None
        missing = "false, samples of the model" if desirable else "true, the data"
        return f"no completion is labeled {missing}: a term of the objective is always 0. Add such rows."

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return the losses of the data and those of the model's samples.

        Args:
            batch: Completions with ``preference`` and ``measures["value"]``.

        Returns:
            Two terms of shape (N,), means over tokens: ``data`` and ``model``, the second with scale ½; the metrics
            ``nll`` (mean over tokens) and ``value`` (mean of V) of each completion, and ``temporal_difference`` (mean
            of ``Q_t - γ V_{t+1}``) of those of the data.

        Raises:
            ValueError: A needed field is None.
        """
        mask, data = batch.completion_mask, batch.require("preference") > 0
        logprobs = batch.logprobs.masked_fill(~mask, 0.0)
        value = batch.require("measures.value").masked_fill(~mask, 0.0)
        following = self.gamma * F.pad(value, (0, 1))[:, 1:]  # 0 after the last token, which masking leaves
        difference = (logprobs + value - following).masked_fill(~mask, 0.0)
        drop = (value - following).masked_fill(~mask, 0.0)
        # Each completion has one of the two losses; the other is 0, with a weight of 0.
        of_data = batch.sequence_sum(difference.square() / (4 * self.alpha) - difference + drop / 2)
        parts = {"data": (of_data, data, 1.0), "model": (batch.sequence_sum(drop), ~data, 0.5)}
        terms: list[Term] = []
        for name, (losses, rows, scale) in parts.items():
            term = completion_term(losses.masked_fill(~rows, 0.0), batch.num_tokens, "token_mean", scale, name=name)
            terms.append(term._replace(weights=batch.weighted(term.weights * rows.to(term.weights.dtype))))
        with torch.no_grad():
            metrics = {
                "nll": -batch.sequence_sum(logprobs) / batch.num_tokens,
                "value": batch.sequence_sum(value) / batch.num_tokens,
                "temporal_difference": (batch.sequence_sum(difference) / batch.num_tokens)[data],
            }
        return ObjectiveOutput(tuple(terms), {name: each.detach() for name, each in metrics.items()})
