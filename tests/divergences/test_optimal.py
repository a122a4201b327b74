import math

import pytest
import torch

from falign import divergences
from falign.divergences import from_generator, optimal_weights
from tests.reference.test_estimators import NAMES

REWARDS = torch.tensor([0.3, -0.2, 1.0, 0.1, 0.1, -1.5, 0.9], dtype=torch.float64)


def strength(name):
    """``f''(1)``, by which β is divided: as little as 1e-12 in the list."""
    curvature = divergences.get(name).second_derivative_at_one
    return 1.0 if math.isnan(curvature) else curvature


def value(weights, divergence, beta):
    """``E_π[r] - β D_f`` of weights on the samples."""
    f = divergence.f(weights.clamp(min=1e-300).log())
    return (weights * REWARDS - beta * f).mean()


@pytest.mark.parametrize("beta", [0.05, 0.4, 5.0])
@pytest.mark.parametrize("name", NAMES)
def test_no_other_weights_of_mean_one_are_better(name, beta):
    divergence, beta = divergences.get(name), beta / strength(name)
    best = optimal_weights(REWARDS, divergence, beta)
    assert (best >= 0).all()
    assert best.mean().item() == pytest.approx(1.0, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 0.1, 1e-3):
        for _ in range(8):
            other = (best + scale * torch.randn(7, generator=generator, dtype=torch.float64)).clamp(min=0)
            other = other + 1e-6
            other = other / other.mean()
            assert value(other, divergence, beta) <= value(best, divergence, beta) + 1e-9


@pytest.mark.parametrize("name", [name for name in NAMES if divergences.get(name).has_barrier])
def test_with_a_barrier_reward_is_beta_times_the_slope_plus_a_constant(name):
    divergence = divergences.get(name)
    beta = 0.4 / strength(name)
    weights = optimal_weights(REWARDS, divergence, beta)
    multiplier = REWARDS - beta * divergence.f_prime(weights.log())
    torch.testing.assert_close(multiplier, multiplier[:1].expand(7), rtol=0, atol=1e-9)


def test_the_reverse_kl_is_a_softmax_even_far_out():
    for beta in (1e-3, 0.1, 1e3):
        weights = optimal_weights(REWARDS, divergences.get("reverse_kl"), beta)
        torch.testing.assert_close(weights, 7 * (REWARDS / beta).softmax(0), rtol=1e-10, atol=1e-300)
    far = REWARDS.float() + 1000
    shifted = optimal_weights(far, divergences.get("reverse_kl"), 0.1)
    torch.testing.assert_close(shifted, (7 * (far.double() / 0.1).softmax(0)).float())


def test_without_a_barrier_the_worst_are_given_up():
    # 1 + (r - λ)/(2 β) while that is positive
    weights = optimal_weights(torch.tensor([0.0, 0.0, 1.0]), divergences.get("pearson_chi2"), 0.1)
    assert weights.tolist() == pytest.approx([0.0, 0.0, 3.0])
    weights = optimal_weights(torch.tensor([0.0, 0.0, 1.0]), divergences.get("pearson_chi2"), 0.5)
    assert weights.tolist() == pytest.approx([1 - 1 / 3, 1 - 1 / 3, 1 + 2 / 3])


def test_total_variation_moves_what_is_worse_by_more_than_beta_to_the_best():
    tv = divergences.get("total_variation")
    rewards = torch.tensor([1.0, 1.0, 0.7, 0.2, -3.0])
    assert optimal_weights(rewards, tv, 0.5).tolist() == pytest.approx([2.0, 2.0, 1.0, 0.0, 0.0])
    assert optimal_weights(rewards, tv, 10.0).tolist() == pytest.approx([1.0] * 5)


def test_equal_rewards_and_a_lone_sample_stay_with_the_reference():
    for name in NAMES:
        divergence = divergences.get(name)
        assert optimal_weights(torch.full((4,), 0.3), divergence, 0.1).tolist() == [1.0] * 4
        assert optimal_weights(torch.tensor([5.0]), divergence, 0.1).tolist() == [1.0]


def test_a_generator_of_ones_own_has_its_optimum():
    mine = from_generator(lambda u: u * torch.log(u), name="mine")
    torch.testing.assert_close(
        optimal_weights(REWARDS, mine, 0.3), 7 * (REWARDS / 0.3).softmax(0), rtol=1e-6, atol=1e-9
    )


def test_bad_arguments_are_refused():
    js = divergences.get("js")
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be positive"):
            optimal_weights(REWARDS, js, beta)
    with pytest.raises((ValueError, TypeError), match="rewards"):
        optimal_weights(torch.zeros(0), js, 0.1)


@pytest.mark.parametrize("name", ["reverse_kl", "pearson_chi2", "total_variation"])
def test_each_row_of_rewards_is_a_prompt_of_its_own(name):
    divergence = divergences.get(name)
    rows = torch.stack([REWARDS, -2 * REWARDS, REWARDS.round()])
    weights = optimal_weights(rows.reshape(3, 1, 7), divergence, 0.3)
    alone = torch.stack([optimal_weights(row, divergence, 0.3) for row in rows])
    torch.testing.assert_close(weights[:, 0], alone, rtol=1e-12, atol=1e-12)
