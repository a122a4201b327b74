import math

import pytest
import torch

from falign import divergences
from falign.divergences import from_generator

LOG_U = torch.tensor([-30.0, -8.0, -1.0, -0.01, 0.0, 0.01, 1.0, 8.0, 25.0], dtype=torch.float64)

OWN = {  # textbook generators, deliberately not in normal form
    "reverse_kl": lambda u: u * torch.log(u),
    "forward_kl": lambda u: -torch.log(u),
    "jensen_shannon": lambda u: u * torch.log(u) - (u + 1) * torch.log((u + 1) / 2),
    "squared_hellinger": lambda u: 2 - 2 * torch.sqrt(u),
    "pearson_chi2": lambda u: u**2,
    "total_variation": lambda u: (u - 1).abs() / 2,
}


@pytest.mark.parametrize("name", OWN)
def test_a_users_generator_equals_the_built_in_family(name):
    own, built_in = from_generator(OWN[name], name="own"), divergences.get(name)
    torch.testing.assert_close(own.f_prime(LOG_U), built_in.f_prime(LOG_U), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(own.f(LOG_U), built_in.f(LOG_U), rtol=1e-7, atol=1e-8)
    assert own.f_prime_at_zero == pytest.approx(built_in.f_prime_at_zero)
    assert own.f_prime_at_infinity == pytest.approx(built_in.f_prime_at_infinity)
    assert own.second_derivative_at_one == pytest.approx(built_in.second_derivative_at_one, rel=1e-4, nan_ok=True)
    assert own.has_barrier == built_in.has_barrier


@pytest.mark.parametrize("name", [n for n in OWN if n != "total_variation"])
def test_inverse_conjugate_and_dual_of_a_users_generator(name):
    own, built_in = from_generator(OWN[name], name="own"), divergences.get(name)
    y = built_in.f_prime(torch.tensor([-3.0, -0.2, 0.0, 0.5, 2.0], dtype=torch.float64))
    torch.testing.assert_close(own.f_prime_inverse(y), built_in.f_prime_inverse(y), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(own.conjugate(y), built_in.conjugate(y), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(own.dual().f(LOG_U[1:-1]), built_in.dual().f(LOG_U[1:-1]), rtol=1e-7, atol=1e-8)


def test_the_dual_is_measured_once_and_an_involution():
    own = from_generator(OWN["reverse_kl"], name="own")
    assert own.dual() is own.dual()
    assert own.dual().dual() is own


def test_gradients_flow_and_stay_finite():
    own = from_generator(lambda u: -torch.log(u), name="own")
    log_u = torch.tensor([-1e4, -3.0, 0.0, 1e4], requires_grad=True)
    for method in (own.f, own.f_prime):
        (slope,) = torch.autograd.grad(method(log_u).sum(), log_u)
        assert torch.isfinite(slope).all()
    (slope,) = torch.autograd.grad(own.f_prime(log_u).sum(), log_u)
    assert slope[1].item() == pytest.approx(math.exp(3.0), rel=1e-6)  # d(1 - 1/u)/d log u = 1/u


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda u: -(u**2), "not convex"),
        (lambda u: torch.log(u - 1) + u**2, "not finite"),
        (lambda u: u.sum(), "elementwise"),
        (lambda u: 3 * u - 2, "is affine .*0 between any two distributions"),
        (lambda u: 0 * u, "is affine"),
    ],
)
def test_a_bad_generator_is_refused(f, message):
    with pytest.raises(ValueError, match=message):
        from_generator(f, name="bad")


def test_a_barrier_is_not_made_up_where_the_limit_is_slow():
    def slow(u):
        return u.pow(1.01)  # f'(0+) = -1.01 in normal form, reached only at u ~ e^-500

    with pytest.raises(ValueError, match="pass f_prime_at_zero"):
        from_generator(slow, name="slow", f_prime_at_infinity=math.inf)
    told = from_generator(slow, name="slow", f_prime_at_zero=-1.01, f_prime_at_infinity=math.inf)
    assert not told.has_barrier
