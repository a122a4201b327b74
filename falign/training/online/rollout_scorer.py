"""Scores of a rollout before its first update, and the gap between the sampler's log-probabilities and the policy's."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from falign.errors import EngineError
from falign.models.heads import ValueHead
from falign.objectives import (
    BaseObjective,
    RunningPartition,
    reference_names,
    references_of,
)
from falign.raised import calling
from falign.references import Reference, ReferenceScores, field_of_reference
from falign.rollouts.buffer import RolloutBuffer
from falign.runfile.prompts_config import RolloutConfig
from falign.scoring import Scorer
from falign.training.online.groups import Group, rollout_buffer
from falign.training.processes import gathered, own_batches
from falign.training.trl_metrics import correction_metrics

__all__ = ["Corrected", "RolloutScorer", "correct", "gap_metrics", "require_gap"]

_LOG_2 = math.log(2)

OF_GROUPS: dict[str, Callable[[Sequence[Group]], Tensor]] = {
    "rewards": lambda groups: _numbers([reward for group in groups for reward in group.rewards]),
    "from_reference": lambda groups: torch.zeros(sum(len(group.rollouts) for group in groups), dtype=torch.bool),
    "features": lambda groups: _numbers([features for group in groups for features in group.features()]),
}
"""Fields of sampled completions that need no model."""


@dataclass
class RolloutScorer:
    """Turn groups into the rollout that the updates read.

    Attributes:
        policy: The policy before the first update.
        references: References by name.
        current: Returns the objective with the coefficients of the rollout; its needs determine what is computed.
        rollout: Sizes of rollouts.
        batch_size: Prompts per forward pass.
        scorer: Scorer with a layout that the model can read.
        value_head: Value head, for objectives that read values.
        partition: Running estimates of log Z.
    """

    policy: nn.Module
    references: Mapping[str, Reference]
    current: Callable[[], BaseObjective]
    rollout: RolloutConfig
    batch_size: int
    scorer: Scorer
    value_head: ValueHead | None
    partition: RunningPartition = field(default_factory=RunningPartition)

    def __call__(self, groups: Sequence[Group]) -> tuple[RolloutBuffer, dict[str, Tensor]]:
        """Return the rollout and its metrics."""
        rollout, metrics = self._scored(self._sampled(groups)), dict[str, Tensor]()
        if self.rollout.correction is not None:
            level = self._answers.correction_level
            assert level is not None, "RunConfig.check refuses a correction that the objective does not support"
            old, cut, weights = correct(
                rollout.values("old_logprobs"),
                rollout.values("sampler_logprobs"),
                rollout.mask,
                importance=level,
                cap=self.rollout.correction.cap,
            )
            rollout, metrics["sampler/truncated"] = rollout.with_columns({"old_logprobs": old}), cut
            metrics |= correction_metrics(weights)
        if "log_partition" in self._answers.needs:
            rollout = self._with_partition(rollout)
        return _prepared(rollout, self._answers), metrics

    @property
    def _answers(self) -> BaseObjective:
        return self.current()

    def _sampled(self, groups: Sequence[Group]) -> RolloutBuffer:
        needs = self._answers.needs
        if "pairs" in self._answers.preference_kinds and self.rollout.ranked == "best_worst":
            groups = [group.best_and_worst() for group in groups]
        rollout = rollout_buffer(groups, compared="preference" in needs)
        return rollout.with_columns({name: of(groups) for name, of in OF_GROUPS.items() if name in needs})

    def _scored(self, rollout: RolloutBuffer) -> RolloutBuffer:
        """Add the scores of policy and references that are needed before the first update."""
        needs = self._answers.needs
        # References with measures run at each update anyway, and give their log-probabilities in the same pass.
        later = references_of(self._answers.measures.values())
        prepared = reference_names(self._answers.needs_to_prepare, {})
        before = (reference_names(self._answers.needs_of_samples, {}) - {*later}) | prepared
        # References that the objective reads only for stored samples, which come with their log-probabilities.
        unread = reference_names(self._answers.needs, {}) - before - {*later}
        # If the samples are not from the current policy's distribution, importance weights are relative to the
        # sampler's, which it recorded.
        elsewhere = self.rollout.temperature != 1.0 or self.rollout.ahead
        # With a single update per rollout, the policy is still the one that sampled: importance weights are 1.
        wants_policy = (
            self.rollout.correction is not None
            or "old_values" in needs
            or (not elsewhere and ("log_partition" in needs or self.rollout.num_updates > 1))
        )
        if before or wants_policy:
            own: list[RolloutBuffer] = []
            for prompts, counted in own_batches(range(len(rollout)), self.batch_size):
                scored = self._with_scores(rollout.select(prompts), before, wants_policy=wants_policy)
                own += [scored] if counted else []
            rollout = RolloutBuffer.concat(gathered(own))
        if elsewhere and self.rollout.correction is None:
            rollout = rollout.with_columns({"old_logprobs": rollout.values("sampler_logprobs")})
        return rollout.without([field_of_reference(name) for name in sorted(unread)])

    def _with_scores(self, rollout: RolloutBuffer, before: Collection[str], *, wants_policy: bool) -> RolloutBuffer:
        """Add log-probabilities of references and of the policy."""
        batch = self.scorer.lay_out(rollout.trees, model=self.policy)
        read = {name: reference for name, reference in self.references.items() if name in before}
        scores = ReferenceScores(self.policy, batch, chunk_tokens=self.scorer.chunk_tokens)
        found = {field_of_reference(name): logprobs for name, logprobs in scores.all_logprobs(read).items()}
        if wants_policy:
            target = None if self.value_head is None else self.value_head.target
            scores = self.scorer.scores(self.policy, batch, value_head=target)
            found["old_logprobs"] = scores.logprobs
            if scores.values is not None:
                found["old_values"] = scores.values
        return rollout.with_columns(found)

    def _with_partition(self, rollout: RolloutBuffer) -> RolloutBuffer:
        """Add each completion's estimate of log Z, from all other completions of its prompt so far."""
        # Sources may share places: the first text of each is "texts:1", and a file may be read under two templates.
        keys = [f"{tree.place} {list(tree.prompt_ids)}" for tree in rollout.trees for _ in tree.completion_ids]
        weights = self._answers.log_weights(rollout.batch())
        return rollout.with_columns({"log_partition": self.partition.update(keys, weights)})


def _numbers(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _prepared(rollout: RolloutBuffer, objective: BaseObjective) -> RolloutBuffer:
    """Add the fields that the objective computes once from a whole rollout."""
    batch = rollout.batch()
    with calling("objective", objective):
        prepared = objective.prepare(batch)
    return rollout.with_columns({n: value for n, value in prepared.tensors().items() if n not in batch.tensors()})


class Corrected(NamedTuple):
    """Log-probabilities that make ``π/π_old`` the bounded weight of the sampler's distribution.

    Attributes:
        old_logprobs: ``log π_old``, float64, shape (N, T); 0 where masked.
        cut: 1 for each weight above the bound, else 0.
        weights: The bounded weights, of tokens or of whole completions.
    """

    old_logprobs: Float[Tensor, "N T"]
    cut: Float[Tensor, " M"]
    weights: Float[Tensor, " M"]


def gap_metrics(log_ratio: Float[Tensor, " M"]) -> dict[str, Tensor]:
    """Return metrics of ``log π - log π_sampler`` at sampled tokens.

    Returns:
        ``sampler/logprob_gap`` and ``sampler/logprob_gap_max``, logged as mean and maximum, and
        ``sampler/ratio_outside``: 1 if π/π_sampler is outside [1/2, 2].
    """
    gap = log_ratio.detach().abs()
    return {
        "sampler/logprob_gap": gap,
        "sampler/logprob_gap_max": gap,  # logged as a maximum
        "sampler/ratio_outside": (gap > _LOG_2).to(gap.dtype),
    }


def require_gap(log_ratio: Float[Tensor, " M"], bound: float, *, step: int) -> None:
    """Refuse samples from a distribution other than the policy's.

    Raises:
        EngineError: The mean gap is above the bound.
    """
    gap = log_ratio.detach().abs()
    if not gap.mean() <= bound:  # written so that NaN is refused too
        raise EngineError(
            f"Step {step}: log-probabilities of sampler and trainer differ by {gap.mean():.2g} nats on average over "
            f"{gap.numel()} tokens, {gap.max():.2g} at most, and {bound:.2g} is allowed (rollout.engine.max_gap): the "
            "sampler does not have these weights. Nothing was learned from these samples; restart the server, then "
            "resume the run."
        )


def correct(
    policy_logprobs: Float[Tensor, "N T"],
    sampler_logprobs: Float[Tensor, "N T"],
    completion_mask: Bool[Tensor, "N T"],
    *,
    importance: Literal["sequence", "token"],
    cap: float,
) -> Corrected:
    """Replace π_old by the sampler's distribution, with importance weights truncated at a bound.

    With π the policy before the first update and μ the sampler, ``log π_old = max(log μ, log π - log cap)`` at each
    token, so that ``π/π_old = min(π/μ, cap)``; for whole completions the same holds of the sum over tokens.

    Args:
        policy_logprobs: log π.
        sampler_logprobs: log μ.
        completion_mask: True on completion tokens.
        importance: Unit of a weight: a token or a whole completion.
        cap: The bound, at least 1.

    Source:
        Truncated importance sampling: Ionides, J. Comput. Graph. Stat. 17 (2008) 295.
    """
    sampler = sampler_logprobs.double()
    log_weight = (policy_logprobs.double() - sampler).masked_fill(~completion_mask, 0.0)
    if importance == "token":
        excess = (log_weight - math.log(cap)).clamp(min=0)
        cut = excess[completion_mask] > 0
        weights = (log_weight - excess)[completion_mask]
    else:
        whole = (log_weight.sum(dim=-1) - math.log(cap)).clamp(min=0)
        cut = whole > 0
        weights = log_weight.sum(dim=-1) - whole
        excess = (whole / completion_mask.sum(dim=-1))[:, None]  # spread evenly: only the sum over tokens matters
    return Corrected((sampler + excess).masked_fill(~completion_mask, 0.0), cut.double(), weights.exp())
