"""What has to be known of a rollout before its first update, computed from all of it at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from falign.objectives import (
    BaseObjective,
    Objective,
    RunningPartition,
    complete,
    reference_names,
    references_of,
)
from falign.references import Reference, field_of_reference
from falign.rollouts.buffer import RolloutBuffer
from falign.runfile.prompts_config import RolloutConfig
from falign.scoring import Scorer
from falign.training.online.groups import Group, rollout_buffer
from falign.training.online.sampler_gap import correct
from falign.training.processes import gathered, own_batches

__all__ = ["RolloutScorer"]

OF_GROUPS: dict[str, Callable[[Sequence[Group]], Tensor]] = {
    "rewards": lambda groups: _numbers([reward for group in groups for reward in group.rewards]),
    "from_reference": lambda groups: torch.zeros(sum(len(group.rollouts) for group in groups), dtype=torch.bool),
    "features": lambda groups: _numbers([features for group in groups for features in group.features()]),
}
"""Fields of a batch that are known of sampled completions before they are scored."""


@dataclass
class RolloutScorer:
    """Turns groups into the rollout that updates read.

    Attributes:
        policy: As it is before the first update.
        references: What it is held to, by name.
        objective: Says what is needed.
        rollout: Sizes.
        batch_size: Prompts in one forward pass.
        scorer: Its layout is one that the model can read.
        value_head: Values of prefixes, for objectives that read them.
        partition: Running estimates of log Z.
    """

    policy: nn.Module
    references: Mapping[str, Reference]
    objective: Objective
    rollout: RolloutConfig
    batch_size: int
    scorer: Scorer
    value_head: nn.Module | None
    partition: RunningPartition = field(default_factory=RunningPartition)

    def __call__(self, groups: Sequence[Group]) -> tuple[RolloutBuffer, dict[str, Tensor]]:
        """Return the rollout, and what is to be logged of it."""
        rollout, metrics = self._scored(self._sampled(groups)), dict[str, Tensor]()
        if self.rollout.correction is not None:
            level = self._answers.correction_level
            assert level is not None, "the run file is checked for that"
            old, cut = correct(
                rollout.values("old_logprobs"),
                rollout.values("sampler_logprobs"),
                rollout.mask,
                importance=level,
                cap=self.rollout.correction.cap,
            )
            rollout, metrics["sampler/truncated"] = rollout.with_columns({"old_logprobs": old}), cut
        if "log_partition" in self.objective.needs:
            rollout = self._with_partition(rollout)
        return _prepared(rollout, self._answers), metrics

    @property
    def _answers(self) -> BaseObjective:
        return complete(self.objective)

    def _sampled(self, groups: Sequence[Group]) -> RolloutBuffer:
        needs = self.objective.needs
        compares = "preference" in needs
        if compares and self.rollout.ranked == "best_worst":
            groups = [group.best_and_worst() for group in groups]
        rollout = rollout_buffer(groups, compared=compares)
        return rollout.with_columns({name: of(groups) for name, of in OF_GROUPS.items() if name in needs})

    def _scored(self, rollout: RolloutBuffer) -> RolloutBuffer:
        """Add what policy and reference say before the first update, as far as it is needed then."""
        needs = self.objective.needs
        # Whole distributions are read at each update, which has the log-probabilities from the same pass.
        later = references_of(self.objective.measures.values())
        before = reference_names(self._answers.needs_of_samples, {}) - {*later}
        unread = reference_names(self.objective.needs, {}) - before - {*later}  # of samples: stored ones bring theirs
        # Then the sampler's law, which it reports, is what importance weights are to.
        elsewhere = self.rollout.temperature != 1.0 or self.rollout.ahead
        # On the only update of a rollout the policy is the one that sampled.
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
        """Add log-probabilities of some references and of the policy."""
        batch = self.scorer.lay_out(rollout.trees, model=self.policy)
        found = {
            field_of_reference(name): reference.logprobs(self.policy, batch)
            for name, reference in self.references.items()
            if name in before
        }
        if wants_policy:
            scores = self.scorer.scores(self.policy, batch, value_head=self.value_head)
            found["old_logprobs"] = scores.logprobs
            if scores.values is not None:
                found["old_values"] = scores.values
        return rollout.with_columns(found)

    def _with_partition(self, rollout: RolloutBuffer) -> RolloutBuffer:
        """Add each completion's estimate of log Z, made of all others of its prompt, now and before."""
        # Sources may share places: the first text of each is "texts:1", and a file may be read under two templates.
        keys = [f"{tree.place} {list(tree.prompt_ids)}" for tree in rollout.trees for _ in tree.completion_ids]
        weights = self._answers.log_weights(rollout.batch())
        return rollout.with_columns({"log_partition": self.partition.update(keys, weights)})


def _numbers(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _prepared(rollout: RolloutBuffer, objective: BaseObjective) -> RolloutBuffer:
    """Add what the objective computes once from a whole rollout."""
    batch = rollout.batch()
    prepared = objective.prepare(batch)
    return rollout.with_columns({n: value for n, value in prepared.tensors().items() if n not in batch.tensors()})
