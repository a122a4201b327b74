"""Policy gradients with an f-divergence penalty: REINFORCE, RLOO, GRPO and PPO from common parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from falign.divergences import Divergence
from falign.objectives.advantage_list import AdvantageEntry, AdvantageList, entries_of
from falign.objectives.advantages import generalized_advantages, group_deviation
from falign.objectives.base import BaseObjective, CompletionBatch, Importance, ObjectiveOutput
from falign.objectives.groups import CompletionMean, check_completion_mean, completion_term, groups_of
from falign.objectives.measures import Measure
from falign.objectives.penalty import Credit, Level, Penalty, Surrogate, SurrogateOutput
from falign.objectives.weights import (
    TokenWeight,
    check_weights,
    completion_factor,
    measures_of_weights,
    merge_measures,
    needs_of_weights,
    token_factor,
)

__all__ = ["PolicyGradient"]


@dataclass(frozen=True)
class PolicyGradient(BaseObjective):
    """Maximize ``E_π[r] - β D_f(π‖π_ref)`` from samples with rewards.

    The loss of a completion is ``-Σ_t min(w A_t, clip(w) A_t)``, with A the advantage of the reward, plus β times a
    surrogate that has the gradient of ``D_f`` (for every f, with ``f'(u)`` in place of the reward). Only the first
    part is clipped. Both form one term, so that β means the same under every reduction.

    REINFORCE is ``advantage="none"``; RLOO is the default. GRPO is ``"group_normalised"``, ``importance="token"``, two
    clips and ``reduction="sequence_mean"``, with any f and level of the penalty. PPO is ``advantage="gae"``,
    ``importance="token"`` and two clips.

    Attributes:
        divergence: f; None for no penalty.
        beta: β, nats of reward; 0 for no penalty, which then needs no reference.
        advantage: A name (see :func:`falign.objectives.get_advantage`), a function of rewards and prompt index, or
            ``"gae"`` with a value head; or a list that begins with one of these, the others being transforms such as
            :func:`falign.objectives.ace`.
        clip_low: Lower clip of ``π/π_old`` at ``1 - clip_low`` where the advantage is negative; None for no bound.
        clip_high: Upper clip of ``π/π_old`` at ``1 + clip_high`` where the advantage is positive; None for no bound.
        importance: ``"sequence"``: ``π/π_old`` of whole completions, exact. ``"token"``: of single tokens, as in PPO.
        level: Level of the penalty: ``"sequence"``, ``"token"`` or ``"vocabulary"``; see :class:`Penalty`.
        credit: Credit assignment of the penalty below sequence level; see :class:`Penalty`.
        reduction: ``"sequence_sum"``, ``"sequence_mean"`` or ``"token_mean"``; see :func:`completion_term`. The first
            has the gradient of the expectation; the others scale β and the reward alike.
        value_coefficient: Scale of the value head's loss; only with ``"gae"``, where None means 0.1.
        gamma: Discount per token; only with ``"gae"``, where None means 1.
        lam: λ of GAE; only with ``"gae"``, where None means 0.95.
        weights: Token weights that multiply the first part, after clipping; a list is a product.
        penalty_weights: Token weights that multiply the penalty. At sequence level and with ``credit="returns"`` they
            must weight whole completions, and no baseline is subtracted from the penalty.
        importance_reference: Name of a reference T: the first part has ``π/(π_old^a T^(1-a))`` in place of ``π/π_old``.
        old_exponent: a, in [0, 1]; 1 does not read T.

    Raises:
        ValueError: A choice is unknown or out of range, or a field has no effect with the others.

    Source:
        Williams 1992; Ahmadian et al., RLOO (arXiv:2402.14740); Shao et al., GRPO (arXiv:2402.03300); Schulman et al.,
        PPO (arXiv:1707.06347). The penalty differs from theirs: it has the gradient of ``D_f``
        (docs/divergences.md). At sequence level a baseline, the mean over the other completions of the prompt, is
        subtracted from it, except with ``advantage="none"``. The value loss is ``½ (V - A - V_old)²``, a mean over
        tokens, not clipped; of two heads, the sum of theirs.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0, -1.0], [-2.0, -1.0]], requires_grad=True),
        ...     completion_mask=torch.ones(2, 2, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0]),
        ...     rewards=torch.tensor([1.0, 0.0]),
        ... )
        >>> PolicyGradient()(batch).mean().backward()
        >>> batch.logprobs.grad  # -A/N
        tensor([[-0.5000, -0.5000],
                [ 0.5000,  0.5000]])
    """

    divergence: Divergence | None = None
    beta: float = 0.0
    advantage: AdvantageEntry | Sequence[AdvantageEntry] = "leave_one_out"
    clip_low: float | None = None
    clip_high: float | None = None
    importance: Importance = "sequence"
    level: Level = "sequence"
    credit: Credit = "fixed_prefix"
    reduction: CompletionMean = "sequence_sum"
    value_coefficient: float | None = None
    gamma: float | None = None
    lam: float | None = None
    weights: Sequence[TokenWeight] = ()
    penalty_weights: Sequence[TokenWeight] = ()
    importance_reference: str | None = None
    old_exponent: float = 1.0

    def __post_init__(self) -> None:
        check_completion_mean(self.reduction)
        if not isinstance(self.advantage, str):
            first, *others = entries_of(self.advantage)
            object.__setattr__(self, "advantage", (first, *others) if others else first)
        check_weights(self.weights)
        check_weights(self.penalty_weights, field="penalty_weights")
        object.__setattr__(self, "weights", tuple(self.weights))
        object.__setattr__(self, "penalty_weights", tuple(self.penalty_weights))
        _ = self._surrogate  # validates its fields
        if not 0 <= self.beta < math.inf:
            raise ValueError(
                f"beta={self.beta!r} must be finite and not negative: a negative one would reward divergence."
            )
        if self.divergence is not None:
            _ = Penalty(self.divergence, self.level, self.credit)  # validates them even if β = 0
        elif self.beta > 0 or self.level != "sequence" or self.credit != "fixed_prefix":
            raise ValueError(
                f"beta={self.beta!r}, level={self.level!r}, credit={self.credit!r} without a divergence: they "
                "configure its penalty; set the divergence, or leave them out."
            )
        _ = self._advantages, self.measures  # unknown names and names with two meanings are refused
        if self.penalty_weights and self.penalty is None:
            raise ValueError("penalty_weights without a penalty: set divergence and beta, or leave them out.")
        for name, default in {"value_coefficient": 0.1, "gamma": 1.0, "lam": 0.95}.items():
            given = getattr(self, name)
            if self._has_values:
                object.__setattr__(self, name, default if given is None else given)
            elif given is not None:
                raise ValueError(
                    f"{name}={given!r} is only for advantage='gae', not {self.advantage!r}; leave it out, or choose it."
                )
        for name, value in {"gamma": self.gamma, "lam": self.lam}.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must be between 0 and 1.")
        if self.value_coefficient is not None and not 0 < self.value_coefficient < math.inf:
            raise ValueError(f"value_coefficient={self.value_coefficient!r} must be positive and finite.")

    @cached_property
    def _advantages(self) -> AdvantageList:
        """The list of advantages, looked up once; without a source where a value head gives the advantages."""
        return AdvantageList.of(self.advantage)

    @property
    def _has_values(self) -> bool:
        return self._advantages.source is None

    @property
    def _surrogate(self) -> Surrogate:
        return Surrogate(self.importance, self.clip_low, self.clip_high, self.importance_reference, self.old_exponent)

    @property
    def penalty(self) -> Penalty | None:
        """The divergence and its estimator; None without a penalty."""
        if self.divergence is None or self.beta == 0:
            return None
        return Penalty(self.divergence, self.level, self.credit)

    @property
    @override
    def needs(self) -> frozenset[str]:
        fields = frozenset({"rewards", "old_logprobs"}) | self._advantages.needs | self._surrogate.needs
        if self._has_values:
            fields |= {"values", "old_values"}
        fields |= needs_of_weights([*self.weights, *self.penalty_weights])
        return fields if self.penalty is None else fields | self.penalty.needs

    @property
    @override
    def measures(self) -> Mapping[str, Measure]:
        of_weights = measures_of_weights([*self.weights, *self.penalty_weights])
        return merge_measures({} if self.penalty is None else self.penalty.measures, of_weights)

    @property
    @override
    def needs_to_prepare(self) -> frozenset[str]:
        return self._advantages.needs

    @property
    @override
    def correction_level(self) -> Importance:
        return self.importance

    @override
    def prepare(self, batch: CompletionBatch) -> CompletionBatch:
        """Return the rollout with ``advantages``, and the penalty's ``baseline`` or ``old_values`` if used.

        Args:
            batch: The whole rollout before its first update, with :attr:`needs`.

        Returns:
            The same completions.

        Raises:
            ValueError: A needed field is None, or a prompt has no second completion to compare with.
        """
        rewards, mask = batch.require("rewards"), batch.completion_mask
        if self._has_values:
            assert self.gamma is not None
            assert self.lam is not None
            values = batch.require("values" if batch.old_values is None else "old_values").detach()
            advantages = generalized_advantages(rewards, values, mask, self.gamma, self.lam)
            advantages = self._advantages.transformed(advantages, batch)
            batch = replace(batch, old_values=values)
        else:
            advantages = self._advantages(batch)
        plain = entries_of(self.advantage)[0] == "none" or self.penalty_weights
        if self.penalty is not None and self.level == "sequence" and not plain:
            batch = replace(batch, baseline=self.penalty.baseline(batch))
        return replace(batch, advantages=advantages)

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return the loss of each completion, and with ``"gae"`` the loss of its values.

        Args:
            batch: Completions of whole prompts with :attr:`needs`, after :meth:`prepare` or before. ``old_logprobs``
                may be None if they were sampled from π itself and nothing is clipped.

        Returns:
            One term of shape (N,), a second one for the values with ``"gae"``, and metrics of each completion:
            ``reward``, ``reward_std`` and ``zero_variance_groups`` of its prompt, ``advantage`` (its size),
            ``importance_weight`` and ``clip_ratio/*`` (means over tokens); with a penalty ``divergence/<name>`` (an
            estimate of the penalized divergence) and ``logratios/policy`` (``log u``); with ``"gae"`` ``value_loss``.

        Raises:
            ValueError: A needed field is None.
        """
        if batch.advantages is None:
            batch = self.prepare(batch)
        surrogate = self._surrogate(batch)
        gains = surrogate.gains * token_factor(self.weights, batch) if self.weights else surrogate.gains
        losses = -batch.sequence_sum(gains)
        if self.penalty is not None:
            losses = losses + self.beta * self._weighted(self.penalty, batch)
        terms = [completion_term(losses, batch.num_tokens, self.reduction, name="policy_gradient")]
        metrics = self._metrics(batch, surrogate)
        if self._has_values:
            assert self.value_coefficient is not None
            # A_t + V_t: the λ-return, which the values learn to predict.
            target = batch.require("advantages") + batch.require("old_values")
            errors = batch.sequence_sum((batch.require("values") - target).square() / 2)
            if (second := batch.second_values) is not None:
                errors = errors + batch.sequence_sum((second - target).square() / 2)
                gap = (second - batch.require("values")).detach().abs()
                metrics["value_gap"] = batch.sequence_sum(gap) / batch.num_tokens
            terms.append(completion_term(errors, batch.num_tokens, "token_mean", self.value_coefficient, name="values"))
            metrics["value_loss"] = errors.detach() / batch.num_tokens
        return ObjectiveOutput(tuple(terms), metrics)

    def _weighted(self, penalty: Penalty, batch: CompletionBatch) -> Tensor:
        if not self.penalty_weights:
            return penalty.loss(batch)
        if self.level == "sequence" or self.credit == "returns":  # a completion's loss is not a sum over its tokens
            return penalty.loss(batch) * completion_factor(self.penalty_weights, batch)
        return penalty.loss(batch, token_factor(self.penalty_weights, batch))

    @torch.no_grad()
    def _metrics(self, batch: CompletionBatch, surrogate: SurrogateOutput) -> dict[str, Tensor]:
        rewards, groups = batch.require("rewards"), groups_of(batch.prompt_index)
        deviation = group_deviation(rewards, batch.prompt_index)

        def mean_over_tokens(per_token: Tensor) -> Tensor:
            return batch.sequence_sum(per_token.to(deviation.dtype)) / batch.num_tokens

        metrics = {
            "reward": rewards,
            "reward_std": deviation,
            "zero_variance_groups": ((deviation == 0) & (groups.size > 1)).to(deviation.dtype),
            "advantage": mean_over_tokens(batch.require("advantages").abs()),
            "importance_weight": mean_over_tokens(surrogate.importance_weight),
        }
        if self.clip_low is not None:
            metrics["clip_ratio/low"] = mean_over_tokens(surrogate.clipped_low)
        if self.clip_high is not None:
            metrics["clip_ratio/high"] = mean_over_tokens(surrogate.clipped_high)
        if self.penalty is not None:
            metrics[self.penalty.metric] = self.penalty.value(batch)
            metrics["logratios/policy"] = batch.sequence_sum(batch.log_ratio)
        return {name: value.detach() for name, value in metrics.items()}
