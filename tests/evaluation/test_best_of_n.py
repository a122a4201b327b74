import math

import mpmath
import pytest
import torch

from falign import divergences
from falign.evaluation.frontier import best_of_n_divergence

GENERATORS = {
    "reverse_kl": lambda u: u * mpmath.log(u) - u + 1,
    "forward_kl": lambda u: -mpmath.log(u) + u - 1,
    "jensen_shannon": lambda u: (u * mpmath.log(2 * u / (1 + u)) + mpmath.log(2 / (1 + u))) / 2,
    "jeffreys": lambda u: (u - 1) * mpmath.log(u),
    "squared_hellinger": lambda u: (1 - mpmath.sqrt(u)) ** 2,
    "pearson_chi2": lambda u: (u - 1) ** 2,
    "total_variation": lambda u: abs(u - 1) / 2,
    "le_cam": lambda u: (1 - u) ** 2 / (1 + u),
}


@pytest.mark.parametrize("n", [2, 3, 16, 128])
@pytest.mark.parametrize("name", GENERATORS)
def test_the_distance_is_the_integral_over_ranks(name, n):
    generator, divergence = GENERATORS[name], divergences.get(name)
    # The scale of a generator is a convention; the second derivative or the value far out says which one is in use.
    at = torch.tensor(1.5, dtype=torch.float64)
    scale = divergence.f(at).item() / float(generator(mpmath.exp(1.5)))
    one = mpmath.mpf(n) ** (mpmath.mpf(-1) / (n - 1))  # where u = 1
    exact = mpmath.quad(lambda t: generator(n * t ** (n - 1)), [0, one / 2, one, 1])
    assert best_of_n_divergence(divergence, n) == pytest.approx(scale * float(exact), rel=1e-9)


@pytest.mark.parametrize("n", [2, 7, 1000])
def test_known_closed_forms(n):
    assert best_of_n_divergence(divergences.get("reverse_kl"), n) == pytest.approx(math.log(n) - (n - 1) / n, rel=1e-9)
    assert best_of_n_divergence(divergences.get("forward_kl"), n) == pytest.approx(n - 1 - math.log(n), rel=1e-9)
    assert best_of_n_divergence(divergences.get("pearson_chi2"), n) == pytest.approx(n**2 / (2 * n - 1) - 1, rel=1e-9)


@pytest.mark.parametrize("n", [2, 8, 64, 1024])
@pytest.mark.parametrize("a", [1.0001, 1.0005, 1.005, 1.02, 1.1, 0.999, 0.5, -1.0, 3.0, 100.0])
def test_alpha_near_one_and_far_from_it_by_its_closed_form(a, n):
    # ∫ (n t^{n-1})^{1-α} dt = n^{1-α}/(1 + (n-1)(1-α)), infinite where the denominator is not positive.
    power = mpmath.mpf(1) - mpmath.mpf(a)
    denominator = 1 + (n - 1) * power
    exact = (mpmath.mpf(n) ** power / denominator - power - a) / (a * (a - 1)) if denominator > 0 else mpmath.inf
    assert best_of_n_divergence(divergences.get(f"alpha({a})"), n) == pytest.approx(float(exact), rel=1e-6)


def test_what_grows_neither_as_a_power_nor_as_a_logarithm_is_refused():
    own = divergences.from_generator(lambda u: torch.relu(-u.log()).square() + (u - 1) ** 2, name="own")
    with pytest.raises(ValueError, match="own grows toward u = 0"):
        best_of_n_divergence(own, 64)


def test_what_grows_too_fast_towards_zero_is_infinite_and_what_does_not_is_finite():
    assert best_of_n_divergence(divergences.get("neyman_chi2"), 2) == math.inf  # ∫ 1/(2t) dt
    # f(u) = (u^{-1/2} + u/2 - 3/2)/(3/4): the power alone gives ∫ (2t)^{-1/2} dt = √2, and at n = 3 a logarithm
    alpha = divergences.get("alpha(1.5)")
    assert best_of_n_divergence(alpha, 2) == pytest.approx((math.sqrt(2) - 1) / 0.75, rel=1e-7)
    assert best_of_n_divergence(alpha, 3) == math.inf
    # ∫ (n t²)^{-0.45} dt = 3^{-0.45}/0.1, most of it beyond what float64 tells from 0
    steep = divergences.get("alpha(1.45)")
    exact = (3**-0.45 / 0.1 - 1) / (1.45 * 0.45)
    assert best_of_n_divergence(steep, 3) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "pearson_chi2", "total_variation"])
def test_with_ties_the_true_distance_is_less(name):
    """Rewards 0 and 1, and two completions of each: the best of n of an enumerated world, ties broken evenly."""
    divergence, n = divergences.get(name), 3
    reference = torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=torch.float64)
    low = 0.6**n
    best = torch.tensor([low / 2, low / 2, (1 - low) / 2, (1 - low) / 2], dtype=torch.float64)
    exact = (reference * divergence.f((best / reference).log())).sum().item()
    assert 0 < exact < best_of_n_divergence(divergence, n)


def test_the_best_of_one_is_the_reference_and_of_none_is_nothing():
    assert best_of_n_divergence(divergences.get("neyman_chi2"), 1) == 0.0
    with pytest.raises(ValueError, match="n=0"):
        best_of_n_divergence(divergences.get("reverse_kl"), 0)
