from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from falign import FDPO, TDPO
from falign.objectives import Measure, field_of
from falign.references import FrozenModel, objective_inputs
from falign.scoring import PromptTree, completion_scores, pad
from tests.models.tiny import tiny_model
from tests.references.spy import ForwardSpy

BATCH = pad([PromptTree((5, 6), ((7, 8, 1), (9, 1)), (1.0, 0.0), "rows:1")], pad_token_id=1)


@dataclass(frozen=True)
class Likelihood:
    """Reads the policy alone."""

    needs = frozenset()
    measures: ClassVar[dict[str, Measure]] = {}

    def __call__(self, batch):
        raise NotImplementedError


def test_a_reference_that_is_not_asked_for_is_not_run():
    reference = FrozenModel(tiny_model("llama", seed=1))
    spy = ForwardSpy(reference.model)
    policy = tiny_model("llama").eval()
    inputs = objective_inputs(policy, BATCH, references={"reference": reference}, objective=Likelihood())
    completions = inputs.completions
    assert len(spy) == 0
    assert completions.reference_logprobs is None
    scores = completion_scores(policy, BATCH)
    assert torch.equal(completions.logprobs, scores.logprobs)
    assert torch.equal(inputs.entropy, scores.entropy)
    assert torch.equal(completions.preference, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    "objective", [FDPO(), TDPO(), TDPO(variant=1, weighting="activations")], ids=["fdpo", "tdpo", "weighted"]
)
def test_an_objective_gets_what_it_needs_with_the_policys_gradient_and_one_pass_of_the_reference(objective):
    reference = FrozenModel(tiny_model("llama", seed=1))
    policy = tiny_model("llama").eval()
    expected = reference.logprobs(policy, BATCH)
    spy = ForwardSpy(reference.model)
    completions = objective_inputs(
        policy, BATCH, references={"reference": reference}, objective=objective, chunk_tokens=2
    ).completions
    assert len(spy) == 1
    torch.testing.assert_close(completions.reference_logprobs, expected)
    for name in ("reference_logprobs", "token_weights"):
        assert (getattr(completions, name) is not None) == (name in map(field_of, objective.needs))
    assert completions.measures.keys() == objective.measures.keys()
    objective(completions).mean().backward()
    assert policy.lm_head.weight.grad.abs().max() > 0
    assert reference.model.lm_head.weight.grad is None
