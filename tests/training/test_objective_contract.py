"""An objective whose weights depend on the policy is stopped with the rule, not trained on another loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from falign.errors import TrainingError
from falign.objectives import FDPO, CompletionBatch, Measure, Objective, ObjectiveOutput, Term
from falign.references import AdapterOff
from tests.equivalence.runs import lora_policy, run, trees


@dataclass(frozen=True)
class Weighted:
    """f-DPO's losses of completions with weights of the kind that is named."""

    kind: str
    needs = frozenset({"reference_logprobs", "preference"})
    measures: ClassVar[dict[str, Measure]] = {}

    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        log_ratio = batch.sequence_sum(batch.logprobs - batch.require("reference_logprobs"))
        losses = -batch.sequence_sum(batch.logprobs)
        weights = {
            "constant": torch.ones_like(losses),
            "boolean": batch.require("preference") > 0.5,
            "self-normalised": log_ratio.exp() / log_ratio.exp().mean(),
            "detached": log_ratio.detach().exp(),
            "attached, of the same value": torch.ones_like(losses) + 0.0 * losses,
            "softmax": log_ratio.detach().softmax(dim=0),
            "other shape": torch.ones(2 if batch.logprobs.detach().any() else len(losses)),
        }[self.kind]
        terms = (Term(losses, weights),)
        if self.kind == "other shape":
            terms = (Term(losses[: len(weights)], weights),)
        return ObjectiveOutput(terms, {})


def start(tmp_path, kind, *, trained=True, steps=1):
    objective = Weighted(kind)
    assert isinstance(objective, Objective)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": steps}
    return run(tmp_path, lora_policy(trained=trained), AdapterOff(), objective, train=trees(8), **settings)


@pytest.mark.parametrize("kind", ["constant", "boolean"])
def test_weights_of_what_is_given_are_trained_on(tmp_path, kind):
    result = start(tmp_path, kind)
    assert result.logs[0]["loss"] > 0


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("self-normalised", "carry a gradient"),
        ("attached, of the same value", "carry a gradient"),
        ("detached", r"differ by up to [\d.]+ from those before"),
        ("softmax", r"differ by up to 0\.\d+ from"),
        ("other shape", r"have shape \(2,\), and \(4,\) before"),
    ],
)
def test_weights_that_depend_on_the_policy_are_stopped_with_the_rule(tmp_path, kind, found):
    with pytest.raises(TrainingError, match=rf"Step 1: the weights of term loss {found}.*must not depend on log"):
        start(tmp_path, kind)


def test_they_are_looked_at_in_every_step(tmp_path):
    # At the reference all ratios are 1, as with zeros for log-probabilities: only the second step tells.
    with pytest.raises(TrainingError, match="Step 2: the weights of term loss differ by"):
        start(tmp_path, "detached", trained=False, steps=3)


def test_one_weight_for_each_loss():
    with pytest.raises(ValueError, match=r"losses of shape \(3,\) and weights of shape \(3, 1\)"):
        ObjectiveOutput((Term(torch.ones(3), torch.ones(3, 1)),), {}).mean()


def test_half_precision_and_boolean_weights_are_numbers():
    term = Term(torch.full((4,), 3e4, dtype=torch.float16), torch.tensor([True, True, True, False]))
    assert ObjectiveOutput((term,), {}).mean().item() == 3e4


def test_fdpo_is_not_stopped(tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    assert len(run(tmp_path, lora_policy(trained=True), AdapterOff(), FDPO(), train=trees(8), **settings).logs) == 2
