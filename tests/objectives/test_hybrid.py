import dataclasses
import math

import pytest
import torch

from falign import divergences
from falign.objectives import BaseObjective, Hybrid, PolicyGradient, Rehearsal, reduce_terms, total_weights
from tests.objectives.test_policy_gradient import OBJECTIVES, PROMPTS, rollout

JS = divergences.get("js")
FROM_REFERENCE = PROMPTS == 1
HYBRID = Hybrid(
    PolicyGradient(None, 0.0, "group_normalised", 0.2, 0.28, "token", reduction="token_mean"), Rehearsal(JS), 0.3
)


def mixed(**given):
    batch = rollout(from_reference=FROM_REFERENCE, **given)
    hidden = {
        "rewards": batch.rewards.masked_fill(FROM_REFERENCE, math.nan),
        "old_logprobs": batch.old_logprobs.masked_fill(FROM_REFERENCE[:, None], math.nan),
        "reference_logprobs": batch.reference_logprobs.masked_fill(~FROM_REFERENCE[:, None], math.nan),
    }
    return dataclasses.replace(batch, **hidden)


def test_each_kind_of_row_is_read_by_its_own_part_with_its_own_denominator():
    output, plain = HYBRID(mixed()), rollout()
    explored = HYBRID.policy_gradient(plain.select(~FROM_REFERENCE))
    kept = HYBRID.rehearsal(plain.select(FROM_REFERENCE))
    assert output.mean().item() == pytest.approx(explored.mean().item() + 0.3 * kept.mean().item())
    assert [term.weights.sum().item() for term in output.terms] == [7.0, 10.0]
    assert len(output.metrics["reward"]) == 3
    assert len(output.metrics["rehearsal/divergence/jensen_shannon"]) == 3


@pytest.mark.parametrize("name", ["dapo", "rloo"])
def test_micro_batches_of_one_kind_or_the_other_add_up_to_the_whole(name):
    hybrid = Hybrid(OBJECTIVES[name], Rehearsal(JS, "token"), 0.5)
    prepared = hybrid.prepare(mixed())
    assert (prepared.advantages[FROM_REFERENCE] == 0).all()
    output = hybrid(prepared)
    (whole,) = torch.autograd.grad(output.mean(), prepared.logprobs, retain_graph=True)
    for cut in ([FROM_REFERENCE, ~FROM_REFERENCE], [torch.arange(6) % 2 == i for i in range(2)]):
        outputs = [hybrid(prepared.select(rows)) for rows in cut]
        denominators = torch.stack([total_weights(part.terms) for part in outputs]).sum(0)
        total = torch.stack([reduce_terms(part.terms, denominators) for part in outputs]).sum()
        torch.testing.assert_close(total, output.mean(), rtol=1e-12, atol=1e-14)
        (gradient,) = torch.autograd.grad(total, prepared.logprobs)
        torch.testing.assert_close(gradient, whole, rtol=1e-12, atol=1e-14)
        assert torch.isfinite(gradient).all()


def test_a_kind_that_is_missing_has_no_weight_and_no_metrics():
    for rows, kind in ((FROM_REFERENCE, "reward"), (~FROM_REFERENCE, "rehearsal/divergence/jensen_shannon")):
        output = HYBRID(mixed().select(rows))
        assert 0.0 in [term.weights.sum().item() for term in output.terms]
        assert torch.isfinite(output.mean())
        assert kind not in output.metrics


def test_what_the_policy_gradient_prepares_stays_at_its_rows():
    hybrid = Hybrid(PolicyGradient(JS, 0.1, "gae"), Rehearsal(JS), 0.5)
    batch = dataclasses.replace(mixed(), reference_logprobs=rollout().reference_logprobs)
    prepared, own = hybrid.prepare(batch), hybrid.policy_gradient.prepare(batch.select(~FROM_REFERENCE))
    for name in ("advantages", "baseline", "old_values"):
        torch.testing.assert_close(getattr(prepared, name)[~FROM_REFERENCE], getattr(own, name))
        assert (getattr(prepared, name)[FROM_REFERENCE] == 0).all()


def test_needs_are_those_of_both():
    assert HYBRID.needs == {"rewards", "old_logprobs", "reference_logprobs", "from_reference"}
    assert isinstance(HYBRID, BaseObjective)
    assert HYBRID.measures == {}
    assert Hybrid(OBJECTIVES["ppo"], Rehearsal(JS), 0.1).measures == OBJECTIVES["ppo"].measures
    with pytest.raises(ValueError, match="from_reference, which is None"):
        HYBRID(rollout())


def test_a_negative_coefficient_is_refused():
    with pytest.raises(ValueError, match="rewards forgetting"):
        Hybrid(PolicyGradient(), Rehearsal(JS), -0.1)
