import math

import pytest
import torch

from falign import divergences
from falign.objectives import (
    BinaryConstraint,
    CompletionBatch,
    Cosine,
    DistributionMatching,
    Hybrid,
    Linear,
    Pairwise,
    PolicyGradient,
    Rehearsal,
    Scheduled,
    Stairs,
    Steps,
    complete,
    logistic,
)

JENSEN_SHANNON, REVERSE_KL = divergences.get("jensen_shannon"), divergences.get("reverse_kl")

PARAMETERS = {"alpha": "alpha(0.3)", "generalized_js": "generalized_js(0.3)"}
TWELVE = [PARAMETERS.get(name, name) for name in divergences.names()]


def test_a_ramp_holds_its_ends_exactly_and_moves_between_them():
    beta = Linear(0.1, 0.7, steps=3, begin=2)
    assert [beta(step) for step in (0, 2, 5, 6)] == [0.1, 0.1, 0.7, 0.7]
    assert beta(3) == pytest.approx(0.3)
    assert beta(4) == pytest.approx(0.5)
    cosine = Cosine(2.0, 0.0, steps=4)
    assert [cosine(step) for step in range(6)] == pytest.approx([2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0, 0])
    assert {Linear(0.3, 0.3, steps=7)(step) for step in range(9)} == {0.3}


def test_phases_and_stairs_change_at_their_steps():
    phases = Steps({0: 1.0, 5: 0.1, 8: 0.3})
    assert [phases(step) for step in (0, 4, 5, 7, 8, 100)] == [1.0, 1.0, 0.1, 0.1, 0.3, 0.3]
    # TCOD: 1 + floor(step/k), here at most 4.
    horizon = Stairs(1, 4, every=6)
    assert [horizon(step) for step in range(30)] == [min(1 + step // 6, 4) for step in range(30)]
    assert [Stairs(8, 1, by=-3)(step) for step in range(5)] == [8, 5, 2, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0.1, 0.2, steps=0), "steps=0: the schedule would end before it begins"),
        (lambda: Cosine(0.1, 0.2, steps=-5), "steps=-5"),
        (lambda: Linear(0.1, 0.2, steps=5, begin=-1), "begin=-1"),
        (lambda: Linear(0.1, math.inf, steps=5), "end=inf"),
        (lambda: Steps({5: 0.1}), "none is 0"),
        (lambda: Steps({0: 0.1, 9: 0.3, 5: 0.2}), "must ascend"),
        (lambda: Steps({0: 0.1, 1.5: 0.3}), "whole numbers"),
        (lambda: Stairs(1, 8, by=-1), "by=-1 does not lead from 1 to 8"),
        (lambda: Stairs(1, 8, every=0), "every=0"),
        (lambda: Scheduled(Pairwise(REVERSE_KL), {}), "schedules is empty"),
        (lambda: Scheduled(Pairwise(REVERSE_KL), {"bata": Linear(0.1, 0.2, steps=3)}), "bata is not a field; .*beta"),
        (
            lambda: Scheduled(Pairwise(REVERSE_KL), {"beta": Linear(0.1, -0.1, steps=10)}),
            r"at step 5 of the schedule, beta=0.0: beta",
        ),
        (
            lambda: Scheduled(Pairwise(REVERSE_KL), {"divergence": Steps({0: "reverse_kl", 3: "total_variation"})}),
            "at step 3 of the schedule, divergence='total_variation'",
        ),
        (
            lambda: Scheduled(PolicyGradient(), {"importance": Steps({0: "token", 3: "sequence"})}),
            "unit of importance weights must not change",
        ),
        (
            lambda: Scheduled(
                DistributionMatching(JENSEN_SHANNON, BinaryConstraint()), {"target": Steps({0: BinaryConstraint()})}
            ),
            "target has a schedule",
        ),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def rollout(**fields):
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(4, 3, dtype=torch.float64, generator=generator)
    return CompletionBatch(
        logprobs=logprobs.requires_grad_(),
        completion_mask=torch.ones(4, 3, dtype=torch.bool),
        prompt_index=torch.tensor([0, 0, 1, 1]),
        rewards=torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64),
        reference_logprobs=-torch.rand(4, 3, dtype=torch.float64, generator=generator),
        **fields,
    )


def gradient(objective, **fields):
    batch = rollout(**fields)
    objective(batch).mean().backward()
    return batch.logprobs.grad


@pytest.mark.parametrize("name", TWELVE)
def test_the_gradient_at_each_step_is_that_of_the_objective_with_that_coefficient(name):
    beta, f = Linear(0.5, 0.1, steps=8), divergences.get(name)
    annealed = Scheduled(PolicyGradient(f, beta=0.9, level="token"), {"beta": beta})
    for step in (0, 3, 8, 20):
        expected = gradient(PolicyGradient(f, beta=beta(step), level="token"))
        assert torch.equal(gradient(annealed.at(step)), expected)
    assert not torch.equal(gradient(annealed.at(0)), gradient(annealed.at(8)))


def test_a_divergence_by_name_and_a_coefficient_of_a_part():
    hybrid = Hybrid(PolicyGradient(), Rehearsal(JENSEN_SHANNON), coefficient=0.1)
    phases = {"rehearsal.divergence": Steps({0: "forward_kl", 4: "reverse_kl"}), "coefficient": Linear(0.25, 0.75, 4)}
    scheduled = Scheduled(hybrid, phases)
    stored = torch.tensor([False, False, True, True])
    for step, f, coefficient in ((2, "forward_kl", 0.5), (4, "reverse_kl", 0.75)):
        plain = Hybrid(PolicyGradient(), Rehearsal(divergences.get(f)), coefficient=coefficient)
        assert torch.equal(gradient(scheduled.at(step), from_reference=stored), gradient(plain, from_reference=stored))
    assert scheduled.coefficients(2) == pytest.approx({"coefficient": 0.5})


def test_needs_and_measures_are_those_of_all_steps_and_at_gives_those_of_one():
    penalized = PolicyGradient(REVERSE_KL, beta=0.1, level="vocabulary")
    scheduled = complete(Scheduled(penalized, {"beta": Linear(0.0, 0.1, steps=10, begin=5)}))
    assert "reference_logprobs" in scheduled.needs
    assert "divergence" in scheduled.measures
    assert "reference_logprobs" not in scheduled.at(5).needs
    assert not scheduled.at(5).measures
    assert scheduled.at(6).measures == penalized.measures
    switched = Scheduled(penalized, {"divergence": Steps({0: "forward_kl", 5: "reverse_kl"})})
    assert {measure.divergence.name for measure in switched.measures.values()} == {"forward_kl", "reverse_kl"}


def test_the_reward_is_that_of_the_last_step_and_the_loss_asks_for_a_step():
    scheduled = Scheduled(Pairwise(JENSEN_SHANNON, logistic), {"beta": Linear(0.5, 0.1, steps=8)})
    assert torch.equal(
        scheduled.completion_rewards(rollout()), Pairwise(JENSEN_SHANNON, logistic, 0.1).completion_rewards(rollout())
    )
    assert scheduled.link == Pairwise(JENSEN_SHANNON, logistic, 0.1).link
    with pytest.raises(TypeError, match=r"objective.at\(step\)"):
        scheduled(rollout())


def test_an_objective_without_schedules_is_itself_at_every_step():
    plain = PolicyGradient(REVERSE_KL, beta=0.1)
    assert plain.at(7) is plain
    assert plain.coefficients(7) == {}
