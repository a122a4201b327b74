import math

import pytest
import torch

from falign import divergences
from falign.divergences import Alpha, ForwardKL, GeneralizedJS, JensenShannon, ReverseKL

LOG_U = torch.tensor([-5.0, -1.0, -0.01, 0.0, 0.01, 1.0, 5.0], dtype=torch.float64)


@pytest.mark.parametrize(("end", "limit"), [(0.0, "reverse_kl"), (1.0, "forward_kl")])
@pytest.mark.parametrize("method", ["f", "f_prime", "f_prime_inverse", "conjugate"])
def test_alpha_reaches_both_kl_at_its_ends(end, limit, method):
    x = LOG_U if method in ("f", "f_prime") else torch.linspace(-2, 0.9, 7, dtype=torch.float64)
    expected = getattr(divergences.get(limit), method)(x)
    for near in (end, end + 1e-9, end - 1e-9):
        torch.testing.assert_close(getattr(Alpha(near), method)(x), expected, rtol=1e-6, atol=1e-8)


def test_alpha_one_half_is_twice_squared_hellinger_and_minus_one_half_of_pearson():
    torch.testing.assert_close(Alpha(0.5).f(LOG_U), 2 * divergences.get("squared_hellinger").f(LOG_U))
    torch.testing.assert_close(Alpha(-1.0).f(LOG_U), divergences.get("pearson_chi2").f(LOG_U) / 2)
    torch.testing.assert_close(Alpha(2.0).f(LOG_U), divergences.get("neyman_chi2").f(LOG_U) / 2)


def test_jensen_shannon_is_twice_the_generalized_one_at_one_half():
    torch.testing.assert_close(JensenShannon().f(LOG_U), 2 * GeneralizedJS(0.5).f(LOG_U))


def test_jeffreys_is_the_sum_of_both_kl():
    expected = ReverseKL().f(LOG_U) + ForwardKL().f(LOG_U)
    torch.testing.assert_close(divergences.get("jeffreys").f(LOG_U), expected)


@pytest.mark.parametrize("b", [0.1, 0.5, 0.8])
def test_generalized_js_is_the_mixture_of_two_kl_to_the_mixture(b):
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(9, generator=generator, dtype=torch.float64).softmax(-1)
    q = (3 * torch.rand(9, generator=generator, dtype=torch.float64)).softmax(-1)
    m = b * p + (1 - b) * q
    expected = b * (p * (p / m).log()).sum() + (1 - b) * (q * (q / m).log()).sum()
    value = (q * GeneralizedJS(b).f((p / q).log())).sum()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("b", [0.0, 1.0, -0.5, math.nan])
def test_generalized_js_refuses_a_weight_outside_its_interval(b):
    with pytest.raises(ValueError, match="0 < b < 1"):
        GeneralizedJS(b)


def test_barriers_are_those_of_the_table():
    barred = {
        name
        for name in ("alpha(0.5)", "alpha(0.0)", "alpha(-0.5)", "generalized_js(0.3)")
        if divergences.get(name).has_barrier
    }
    assert barred == {"alpha(0.5)", "alpha(0.0)", "generalized_js(0.3)"}
    free = {
        name
        for name in divergences.names()
        if name not in ("alpha", "generalized_js") and not divergences.get(name).has_barrier
    }
    assert free == {"pearson_chi2", "total_variation", "le_cam"}
