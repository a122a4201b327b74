import dataclasses

import pytest
import torch

from falign import CompletionBatch, divergences
from falign.objectives import (
    BaseObjective,
    Distillation,
    DistributionMatching,
    Entropy,
    ExponentialReward,
    Hybrid,
    Linear,
    Pairwise,
    PolicyGradient,
    Rehearsal,
    Scheduled,
    Selected,
    Sum,
    Supervised,
)
from tests.conformance.test_objectives import ROWS, batch_for

JS, KL = divergences.get("jensen_shannon"), divergences.get("forward_kl")
GRPO = PolicyGradient(JS, 0.2, "group_normalised", 0.2, 0.3, "token")


def slopes(objective, batch):
    leaves = {name: value for name, value in batch.tensors().items() if value.requires_grad}
    found = torch.autograd.grad(objective(batch).mean(), [*leaves.values()], materialize_grads=True, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("name", ["f-DPO", "PPO", "DPH-RL", "f-DPG", "TDPO2", "distillation, sequences", "own"])
def test_a_sum_of_one_term_is_that_objective_bit_for_bit(name):
    alone, batch = ROWS[name], batch_for(ROWS[name])
    one = Sum({"a": (alone, 1.0)})
    under = {f"measures.a.{key}": batch.measures[key] for key in alone.measures}
    renamed = CompletionBatch.of(
        {**{key: value for key, value in batch.tensors().items() if not key.startswith("measures.")}, **under}
    )
    assert one.needs == alone.needs
    assert set(one.measures) == {f"a.{key}" for key in alone.measures}
    ours, theirs = one(renamed), alone(batch)
    for own, plain in zip(ours.terms, theirs.terms, strict=True):
        assert own.name == f"a.{plain.name}"
        assert torch.equal(own.losses, plain.losses)
        assert torch.equal(own.weights, plain.weights)
        assert own.scale == plain.scale
    assert {f"a/{key}" for key in theirs.metrics} == ours.metrics.keys()
    assert all(torch.equal(ours.metrics[f"a/{key}"], value) for key, value in theirs.metrics.items())
    for key, slope in slopes(alone, batch).items():
        assert torch.equal(slopes(one, renamed)[key.replace("measures.", "measures.a.")], slope)


def test_the_gradient_is_the_weighted_sum_of_the_gradients():
    parts = {"grpo": (GRPO, 0.7), "teacher": (Distillation(KL, level="token"), -1.3), "sft": (Supervised(), 2.0)}
    batch = batch_for(Sum(parts))
    whole = slopes(Sum(parts), batch)["logprobs"]
    expected = sum(weight * slopes(objective, batch)["logprobs"] for objective, weight in parts.values())
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-15)


def test_what_a_term_prepares_is_its_own():
    """Two terms with advantages of their own, one with a baseline, through a copy of the rollout in parts."""
    centred = PolicyGradient(advantage="group_centred")
    both = Sum({"grpo": GRPO, "inner": Sum({"rl": centred, "far": Distillation(KL, level="sequence")})})
    batch = batch_for(both)
    prepared = both.prepare(batch)
    assert {
        "prepared.grpo.advantages",
        "prepared.grpo.baseline",
        "prepared.inner.prepared.rl.advantages",
        "prepared.inner.prepared.far.baseline",
    } <= prepared.tensors().keys()
    assert prepared.advantages is None
    torch.testing.assert_close(prepared.term("grpo").advantages, GRPO.prepare(batch).advantages)
    inner = prepared.term("inner")
    torch.testing.assert_close(inner.term("rl").advantages, centred.prepare(batch).advantages)
    # A part of the rollout does not show the whole group, so its advantages must be those of the whole.
    rows = torch.tensor([True, False, True, True, False, True, True])
    part = prepared.select(rows)
    torch.testing.assert_close(part.term("grpo").advantages, GRPO.prepare(batch).advantages[rows])
    torch.testing.assert_close(
        CompletionBatch.of(part.tensors()).term("inner").term("rl").advantages, centred.prepare(batch).advantages[rows]
    )


def test_stored_samples_reach_only_the_terms_that_tell_them_apart():
    hybrid = Hybrid(PolicyGradient(advantage="none"), Rehearsal(KL), 0.5)
    both = Sum({"dph": hybrid, "teacher": (Distillation(KL, level="sequence"), 0.3)})
    batch = batch_for(both)
    stored = batch.from_reference
    assert both.needs_of_stored == {"reference_logprobs", "from_reference"}
    output = both(both.prepare(batch))
    assert [len(term.losses) for term in output.terms] == [5, 2, 5]
    # What a stored row lacks may be NaN there, as in a rollout.
    hidden = {
        "rewards": batch.rewards.masked_fill(stored, torch.nan),
        "references": {"teacher": batch.references["teacher"].masked_fill(stored[:, None], torch.nan)},
    }
    unread = dataclasses.replace(batch, **hidden)
    assert torch.equal(both(both.prepare(unread)).mean(), output.mean())


def test_the_chosen_and_the_rejected_side_of_pairs_lists_and_labels():
    batch = CompletionBatch(
        logprobs=torch.tensor([[-1.0], [-2.0], [-3.0], [-4.0], [-5.0], [-6.0]]),
        completion_mask=torch.ones(6, 1, dtype=torch.bool),
        prompt_index=torch.tensor([0, 1, 1, 1, 2, 0]),
        preference=torch.tensor([0.0, 2.0, 1.0, 2.0, 0.0, 1.0]),  # a pair, a list with a tie, a label of false
    )
    for completions, kept in {"chosen": [2, 4, 6], "rejected": [1, 3, 5], "all": range(1, 7)}.items():
        nll = Selected(Supervised(), completions)(batch).metrics["nll"]
        assert nll.tolist() == [float(value) for value in kept]
    cloned = Sum({"dpo": Pairwise(JS, beta=0.1), "sft": (Selected(Supervised(), "chosen"), 0.2)})
    assert cloned.needs == {"preference", "reference_logprobs"}
    together = dataclasses.replace(batch, reference_logprobs=torch.zeros(6, 1))
    torch.testing.assert_close(cloned(together).mean(), Pairwise(JS, beta=0.1)(together).mean() + 0.2 * 4.0)


def test_a_sum_has_the_implicit_reward_of_its_one_term_that_has_one():
    dpo = Pairwise(KL, beta=0.3)
    both = Sum({"dpo": dpo, "sft": (Selected(Supervised(), "chosen"), 0.2)})
    batch = batch_for(both)
    assert both.rewarding
    assert both.link == dpo.link
    assert torch.equal(both.completion_rewards(batch), dpo.completion_rewards(batch))
    two = Sum({"dpo": dpo, "other": Pairwise(JS, beta=0.1)})
    assert not two.rewarding
    assert two.link is None
    with pytest.raises(TypeError, match="exactly one of its terms does; here dpo, other"):
        two.completion_rewards(batch)
    assert not Sum({"sft": Supervised()}).rewarding


def test_importance_weights_of_one_unit_and_an_estimate_of_one_z():
    assert Sum({"a": PolicyGradient(), "b": Distillation(KL, level="token")}).correction_level == "sequence"
    assert Sum({"sft": Supervised()}).correction_level is None
    assert Sum({"a": GRPO, "b": Distillation(KL, level="token")}).correction_level is None  # of two units
    fdpg = DistributionMatching(JS, ExponentialReward(0.5))
    both = Sum({"fdpg": fdpg, "teacher": Distillation(KL)})
    batch = batch_for(both)
    assert torch.equal(both.log_weights(batch), fdpg.log_weights(batch))
    with pytest.raises(ValueError, match="a and b each need log_partition"):
        Sum({"a": fdpg, "b": fdpg})


def test_schedules_of_terms_are_those_of_the_sum():
    teacher = Scheduled(PolicyGradient(KL, 0.1), {"beta": Linear(0.5, 0.25, steps=2)})
    both = Sum({"rl": teacher, "sft": (Selected(Supervised(), "chosen"), 0.5)})
    assert [both.at(step).objectives["rl"].beta for step in (0, 1, 9)] == [0.5, 0.375, 0.25]
    assert both.at(1).weights == both.weights
    assert both.coefficients(1) == {"rl.beta": 0.375}
    assert both.learns_from_samples
    plain = Sum({"rl": PolicyGradient(KL, 0.1)})
    assert plain.at(5) is plain
    # The weights of a sum may follow a schedule, too.
    annealed = Scheduled(Sum({"rl": GRPO, "teacher": Distillation(KL)}), {"terms.teacher.1": Linear(1.0, 0.5, steps=2)})
    assert annealed.at(1).weights == {"rl": 1.0, "teacher": 0.75}


def test_only_terms_that_learn_from_samples_make_a_sum_that_does():
    assert Sum(
        {"grpo": GRPO, "teacher": Distillation(KL), "entropy": (Distillation(Entropy()), -0.1)}
    ).learns_from_samples
    assert not Sum({"grpo": GRPO, "sft": Supervised()}).learns_from_samples
    assert Selected(Supervised(), "chosen").learns_from_samples  # the best of what was sampled


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "at least one"),
        ({"a": (Supervised(), 0.0)}, r"terms\['a'\] has weight 0.0: give a finite number other than 0, or leave"),
        ({"a": (Supervised(), float("nan"))}, "weight nan"),
        ({"a.b": Supervised()}, "lower-case letter"),
        ({"dpo": Pairwise(KL), "sft": Supervised()}, r"term sft.*rejected.*Supervised\(...\), completions='chosen'\)"),
    ],
)
def test_sums_that_cannot_be_meant_are_refused(terms, message):
    with pytest.raises(ValueError, match=message):
        Sum(terms)


def test_what_is_not_an_objective_is_refused():
    for make in (lambda: Sum({"a": "sft"}), lambda: Selected("sft", "chosen")):
        with pytest.raises(TypeError, match=r"str has no needs|parameter 'terms'|parameter 'objective'"):
            make()
    assert isinstance(Sum({"sft": Supervised()}), BaseObjective)
