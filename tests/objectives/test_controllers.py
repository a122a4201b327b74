import pytest

from falign import divergences
from falign.objectives import (
    Linear,
    Pairwise,
    PolicyGradient,
    RootDivergence,
    Scheduled,
    Sum,
    TargetDivergence,
)

REVERSE_KL = divergences.get("reverse_kl")


def test_the_target_controller_follows_its_formula_and_stays_within_bounds():
    hold = TargetDivergence(2.0, start=0.1, gain=0.5, low=0.09, high=0.12)
    state = hold.start_state()
    assert hold.value(state) == 0.1
    values = []
    for measured in (2.2, 10.0, 10.0, 1.9, 0.0, 0.0, 0.0, 0.0):
        state = hold.after(state, measured)
        values.append(hold.value(state))
    assert values == pytest.approx([0.105, 0.1155, 0.12, 0.117, 0.1053, 0.09477, 0.09, 0.09])
    smooth = TargetDivergence(2.0, start=0.1, gain=0.5, smoothing=0.9)
    state = smooth.after(smooth.after(smooth.start_state(), 2.0), 3.0)
    assert state == pytest.approx({"value": 0.1 * (1 + 0.5 * 0.05), "mean": 2.1})


def test_the_root_controller_has_a_floor():
    root = RootDivergence(0.8, floor=0.04, smoothing=0.5)
    state = root.start_state()
    assert root.value(state) == pytest.approx(2.0)
    for measured, value in ((0.01, 2.0), (0.31, 1.0)):
        state = root.after(state, measured)
        assert root.value(state) == pytest.approx(value)


def test_the_metric_is_the_only_divergence_or_the_named_one():
    scheduled = Scheduled(PolicyGradient(REVERSE_KL, beta=0.1), {"beta": TargetDivergence(2.0, start=0.1)})
    assert scheduled.observed({"divergence/reverse_kl": 3.0, "reward": 1.0}) == {"beta": 3.0}
    assert scheduled.observed({"reward": 1.0}) == {}
    with pytest.raises(ValueError, match="reports divergence/a, divergence/b: give metric"):
        scheduled.observed({"divergence/a": 3.0, "divergence/b": 1.0})
    with pytest.raises(ValueError, match="follows divergence/a, and its mean is nan"):
        scheduled.observed({"divergence/a": float("nan")})
    named = Scheduled(PolicyGradient(REVERSE_KL, beta=0.1), {"beta": TargetDivergence(2.0, 0.1, metric="reward")})
    assert named.observed({"divergence/a": 3.0, "reward": 1.0}) == {"beta": 1.0}


def test_a_controller_stands_beside_schedules_and_inside_of_parts():
    inner = Scheduled(PolicyGradient(REVERSE_KL, beta=0.1), {"beta": TargetDivergence(2.0, start=0.3)})
    outer = Scheduled(inner, {"objective.clip_low": Linear(0.1, 0.2, steps=10)})
    assert set(outer.controllers) == {"beta"}
    assert outer.at(0).beta == 0.3
    controlled = outer.controlled({"beta": 0.5})
    assert (controlled.at(10).beta, controlled.at(10).clip_low) == (0.5, 0.2)
    assert controlled.coefficients(10) == {"beta": 0.5, "objective.clip_low": 0.2}
    assert outer.observed({"divergence/reverse_kl": 3.0}) == {"beta": 3.0}


def test_a_sum_passes_steps_controllers_and_metrics_on_to_its_terms():
    held = Scheduled(PolicyGradient(REVERSE_KL, beta=0.1), {"beta": TargetDivergence(2.0, start=0.3)})
    annealed = Scheduled(PolicyGradient(REVERSE_KL, beta=0.1), {"beta": Linear(0.1, 0.3, steps=10)})
    both = Sum({"held": held, "annealed": (annealed, 0.5)})
    assert set(both.controllers) == {"held.beta"}
    assert both.knots == (0, 10)
    assert both.observed({"held/divergence/reverse_kl": 3.0, "annealed/divergence/reverse_kl": 4.0}) == {
        "held.beta": 3.0
    }
    now = both.controlled({"held.beta": 0.7}).at(10).objectives
    assert (now["held"].beta, now["annealed"].beta) == (0.7, 0.3)
    weighted = Scheduled(both, {"terms.annealed.1": Linear(0.5, 0.1, steps=10)})
    assert weighted.at(10).weights == {"held": 1.0, "annealed": 0.1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TargetDivergence(0.0, start=0.1), "target=0.0 must be positive"),
        (lambda: TargetDivergence(1.0, start=-0.1), "start=-0.1 must be positive"),
        (lambda: TargetDivergence(1.0, start=0.1, gain=5.0), "gain=5.0"),
        (lambda: TargetDivergence(1.0, start=0.1, smoothing=1.0), "smoothing=1.0"),
        (lambda: TargetDivergence(1.0, start=0.1, low=0.2), "low=0.2, start=0.1, high=100.0"),
        (lambda: RootDivergence(0.0), "strength=0.0"),
        (lambda: RootDivergence(1.0, floor=0.0), "floor=0.0"),
        (
            lambda: Scheduled(Pairwise(REVERSE_KL), {"length_norm": TargetDivergence(1.0, start=0.1)}),
            "length_norm=0.1",
        ),
    ],
)
def test_a_controller_that_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
