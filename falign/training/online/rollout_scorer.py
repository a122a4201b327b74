"""What has to be known of a rollout before its first update, computed from all of it at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from falign.rollouts.scored_trees import ScoredTree, collate, completion_rows, whole_batch
from falign.runfile.prompts_config import RolloutConfig
from falign.scoring import PromptTree, Scorer
from falign.training.online.groups import Group
from falign.training.online.sampler_gap import correct
from falign.training.processes import gathered, own_batches
from falign.training.trainer import split_columns

__all__ = ["RolloutScorer"]

OF_GROUP: dict[str, Callable[[Group], list[Any]]] = {
    "rewards": lambda group: list(group.rewards),
    "from_reference": lambda group: [False] * len(group.rollouts),
    "features": lambda group: group.features(),
}
"""Fields of a batch that are known of sampled completions before they are scored."""


@dataclass
class RolloutScorer:
    """Turns groups into trees that updates read.

    Attributes:
        policy: As it is before the first update.
        references: What it is held to, by name.
        objective: Says what is needed.
        rollout: Sizes.
        batch_size: Prompts in one forward pass.
        scorer: Lays trees out, in a way that the model can read.
        value_head: Values of prefixes, for objectives that read them.
        prepare: Brings a micro-batch to the model's device.
        partition: Running estimates of log Z.
    """

    policy: nn.Module
    references: Mapping[str, Reference]
    objective: Objective
    rollout: RolloutConfig
    batch_size: int
    scorer: Scorer
    value_head: nn.Module | None
    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    partition: RunningPartition = field(default_factory=RunningPartition)

    def __call__(self, groups: Sequence[Group]) -> tuple[list[ScoredTree], dict[str, Tensor]]:
        """Return one tree per group, and what is to be logged of it."""
        trees, metrics = self._scored([self._tree(group) for group in groups]), dict[str, Tensor]()
        if self.rollout.correction is not None:
            level = self._answers.correction_level
            assert level is not None, "the run file is checked for that"
            trees, cut = correct(trees, importance=level, cap=self.rollout.correction.cap)
            metrics["sampler/truncated"] = cut
        if "log_partition" in self.objective.needs:
            trees = self._with_partition(trees)
        return _prepared(trees, self._answers), metrics

    @property
    def _answers(self) -> BaseObjective:
        return complete(self.objective)

    def _tree(self, group: Group) -> ScoredTree:
        compares = "preference" in self.objective.needs
        if compares and self.rollout.ranked == "best_worst":
            group = group.best_and_worst()
        tree = PromptTree(
            group.row.prompt_ids,
            tuple(rollout.completion_ids for rollout in group.rollouts),
            group.rewards if compares else None,
            group.row.place,
        )
        columns: dict[str, Any] = {"sampler_logprobs": [list(rollout.logprobs) for rollout in group.rollouts]}
        columns |= {name: of_group(group) for name, of_group in OF_GROUP.items() if name in self.objective.needs}
        return ScoredTree(tree, columns)

    def _scored(self, trees: list[ScoredTree]) -> list[ScoredTree]:
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
        scored = []
        for own, counted in own_batches(trees, self.batch_size):
            batch, _ = split_columns(self.prepare(collate(own, self.scorer)))
            found = {
                field_of_reference(name): reference.logprobs(self.policy, batch)
                for name, reference in self.references.items()
                if name in before
            }
            found |= {
                field_of_reference(name): torch.full(batch.completion_mask.shape, math.nan) for name in sorted(unread)
            }
            if wants_policy:
                scores = self.scorer.scores(self.policy, batch, value_head=self.value_head)
                found["old_logprobs"] = scores.logprobs
                if scores.values is not None:
                    found["old_values"] = scores.values
            if counted:
                scored += _with_rows(own, found, batch.completion_mask)
        scored = gathered(scored)
        if elsewhere and self.rollout.correction is None:
            scored = [tree.with_columns(old_logprobs=tree.columns["sampler_logprobs"]) for tree in scored]
        return scored

    def _with_partition(self, trees: list[ScoredTree]) -> list[ScoredTree]:
        """Add each completion's estimate of log Z, made of all others of its prompt, now and before."""
        batch = whole_batch(trees)
        # Sources may share places: the first text of each is "texts:1", and a file may be read under two templates.
        keys = [f"{tree.tree.place} {list(tree.tree.prompt_ids)}" for tree in trees for _ in tree.tree.completion_ids]
        weights = self._answers.log_weights(batch)
        estimates = self.partition.update(keys, weights)
        return _with_rows(trees, {"log_partition": estimates}, batch.completion_mask)


def _with_rows(trees: Sequence[ScoredTree], found: Mapping[str, Tensor], mask: Tensor) -> list[ScoredTree]:
    """Add to each tree its completions' rows of some tensors."""
    rows = {name: completion_rows(values.cpu(), mask.cpu()) for name, values in found.items()}
    added, start = [], 0
    for tree in trees:
        stop = start + len(tree.tree.completion_ids)
        added.append(tree.with_columns(**{name: values[start:stop] for name, values in rows.items()}))
        start = stop
    return added


def _prepared(trees: list[ScoredTree], objective: BaseObjective) -> list[ScoredTree]:
    """Add what the objective computes once from a whole rollout."""
    batch = whole_batch(trees)
    prepared = objective.prepare(batch)
    new = {name: value for name, value in prepared.tensors().items() if name not in batch.tensors()}
    return _with_rows(trees, new, batch.completion_mask)
