"""An objective of a user's own that reads a reference by name: ``kind: tests.evaluation.own_objective:NearTeacher``."""

from dataclasses import dataclass

import torch
from torch.nn.functional import softplus
from typing_extensions import override

from falign.divergences import get
from falign.objectives import BaseObjective, DivergenceTo, ObjectiveOutput, Term, pairs_of


@dataclass(frozen=True)
class NearTeacher(BaseObjective):
    """A logistic loss with the implicit reward ``β log(π/π_teacher) - D_f(π‖π_teacher)``; reads no other reference."""

    beta: float

    @property
    @override
    def needs(self):
        return frozenset({"references.teacher", "preference"})

    @property
    @override
    def measures(self):
        return {"away": DivergenceTo(get("forward_kl"), "teacher")}

    @property
    @override
    def rewarding(self):
        return True

    @override
    def completion_rewards(self, batch):
        per_token = self.beta * (batch.logprobs - batch.references["teacher"]) - batch.measures["away"]
        return batch.sequence_sum(per_token)

    @override
    def __call__(self, batch):
        chosen, rejected = pairs_of(batch.require("preference"), batch.prompt_index)
        rewards = self.completion_rewards(batch)
        losses = softplus(rewards[rejected] - rewards[chosen])
        metrics = {"rewards/chosen": rewards[chosen].detach(), "rewards/rejected": rewards[rejected].detach()}
        return ObjectiveOutput((Term(losses, torch.ones_like(losses)),), metrics)
