"""The battery that every divergence passes; a new family is a new row of `exact.EXACT`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import diff, exp, mpf
from torch import Tensor

from falign import divergences
from falign.divergences import Divergence
from falign.testing import divergences as battery
from tests.conformance.exact import EXACT

NAMES = tuple(EXACT)
EVERYWHERE = [*(-30, -29.99, -12.7, -3.1, -1.5001, -1.4999, -1.0, -0.31), *(-1e-2, -1e-4, -1e-7, 0.0)]
LOG_RATIOS = sorted({sign * x for x in EVERYWHERE for sign in (1, -1)} | {0.0})
SMOOTH = tuple(name for name in NAMES if name != "total_variation")


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def divergence(name) -> Divergence:
    return divergences.get(name)


def exact_column(function, log_u: Tensor) -> list[mpf]:
    return [function(exp(mpf(x))) for x in log_u.tolist()]


def assert_relative(actual: Tensor, expected: list[mpf], tolerance: float, log_u: Tensor) -> None:
    for x, a, e in zip(log_u.tolist(), actual.tolist(), expected, strict=True):
        assert abs(mpf(a) - e) <= tolerance * abs(e), f"log u = {x}: {a} instead of {float(e)}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_f_and_f_prime_agree_with_sixty_digits(name, divergence, dtype, tolerance):
    log_u = torch.tensor(LOG_RATIOS, dtype=dtype)
    f, f_prime = EXACT[name]
    assert_relative(divergence.f(log_u), exact_column(f, log_u), tolerance, log_u)
    assert_relative(divergence.f_prime(log_u), exact_column(f_prime, log_u), tolerance, log_u)


@pytest.mark.parametrize("name", SMOOTH)
@given(log_u=st.floats(-30, 30, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-30))
@settings(max_examples=60, deadline=None)
def test_float32_agrees_with_sixty_digits_at_any_ratio(name, log_u):
    x = torch.tensor([log_u], dtype=torch.float32)
    divergence = divergences.get(name)
    f, f_prime = EXACT[name]
    exact = exact_column(f, x)
    if abs(log_u) > 1e-15 and exact[0] >= torch.finfo(x.dtype).tiny:  # below, f ~ f''(1) (log u)²/2 underflows
        assert_relative(divergence.f(x), exact, 1e-6, x)
    exact = exact_column(f_prime, x)
    if log_u == 0 or abs(exact[0]) >= torch.finfo(x.dtype).tiny:  # below, float32 has no seven digits
        assert_relative(divergence.f_prime(x), exact, 1e-6, x)


@pytest.mark.parametrize(
    "check",
    [
        battery.normal_form,
        battery.finite_and_monotone,
        battery.dtypes_and_shapes,
        battery.limits,
        battery.inverse,
        battery.dual,
    ],
    ids=lambda check: check.__name__,
)
def test_the_public_battery_passes(divergence, check):
    check(divergence)


@pytest.mark.parametrize("name", SMOOTH)
def test_autograd_of_f_is_u_times_f_prime(name):
    divergence = divergences.get(name)
    log_u = torch.tensor(LOG_RATIOS, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(divergence.f(log_u).sum(), log_u)
    expected = exact_column(lambda u: u * EXACT[name][1](u), log_u.detach())
    # Near 30 the far form differentiates to terms of the size of f.
    for a, e, f in zip(slope.tolist(), expected, divergence.f(log_u).tolist(), strict=True):
        assert abs(a - float(e)) <= 1e-10 * (abs(float(e)) + abs(f))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_of_f_and_f_prime_pass_gradcheck(name):
    divergence = divergences.get(name)
    log_u = torch.tensor([-2.3, -0.7, 0.0, 1e-3, 0.9, 2.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(divergence.f, log_u, check_forward_ad=True)
    assert torch.autograd.gradcheck(divergence.f_prime, log_u, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(divergence.f, log_u)


@pytest.mark.parametrize("name", [name for name in SMOOTH if name != "le_cam"])
def test_the_gradient_of_f_prime_is_relatively_exact_far_out(name):
    """It is the weight of a completion in f-DPO: small where f' saturates, and not 0 before the ratio is."""
    log_u = torch.tensor([-25.0, -8.0, 8.0, 25.0], dtype=torch.float32, requires_grad=True)
    (weight,) = torch.autograd.grad(divergences.get(name).f_prime(log_u).sum(), log_u)
    for x, w in zip(log_u.tolist(), weight.tolist(), strict=True):
        exact = diff(lambda t: EXACT[name][1](exp(t)), mpf(x))
        assert abs(mpf(w) - exact) <= 2e-6 * abs(exact), f"log u = {x}: {w} instead of {float(exact)}"


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivatives_are_finite_and_right_far_out(name):
    divergence = divergences.get(name)
    places = [-1e4, -9950.0, -9900.0, -800.0, -89.0, -31.0, -1.5, 0.0, 1.5, 31.0, 89.0, 120.0, 800.0, 1e4]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        log_u = torch.tensor(places, dtype=dtype, requires_grad=True)
        for method in (divergence.f, divergence.f_prime):
            (slope,) = torch.autograd.grad(method(log_u).float().sum(), log_u, create_graph=True)
            if slope.requires_grad:
                (curvature,) = torch.autograd.grad(slope.float().sum(), log_u, materialize_grads=True)
                assert torch.isfinite(curvature).all()
    far = torch.tensor([-95.0, -40.0, 40.0, 95.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(divergence.f_prime, far, atol=1e-5)


@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivative_at_one(name):
    divergence = divergences.get(name)
    log_u = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (curvature,) = torch.autograd.grad(divergence.f_prime(log_u), log_u)  # u f''(u) at u = 1
    assert curvature.item() == pytest.approx(divergence.second_derivative_at_one, rel=1e-12)


@pytest.mark.parametrize("name", SMOOTH)
def test_standardized_has_unit_curvature_and_the_same_shape(name):
    divergence = divergences.get(name)
    standard = divergence.standardized()
    log_u = torch.tensor([-3.0, -0.5, 0.2, 4.0], dtype=torch.float64)
    scale = divergence.second_derivative_at_one
    torch.testing.assert_close(standard.f(log_u) * scale, divergence.f(log_u))
    torch.testing.assert_close(standard.f_prime(log_u) * scale, divergence.f_prime(log_u))
    y = 0.4 * standard.f_prime(log_u)
    torch.testing.assert_close(standard.f_prime(standard.f_prime_inverse(y)), y)
    torch.testing.assert_close(standard.conjugate(y) * scale, divergence.conjugate(y * scale))
    assert standard.second_derivative_at_one == 1.0
    assert standard.has_barrier == divergence.has_barrier
    assert standard.dual() == divergence.dual().standardized()


def test_total_variation_cannot_be_standardized():
    with pytest.raises(ValueError, match="kink"):
        divergences.get("total_variation").standardized()


def test_gradient_survives_where_exp_overflows(divergence):
    log_u = torch.tensor([-200.0, 200.0], requires_grad=True)
    (slope,) = torch.autograd.grad(divergence.f_prime(log_u).sum(), log_u)
    unbounded = [divergence.f_prime_at_zero == -math.inf, divergence.f_prime_at_infinity == math.inf]
    assert [(s > 0).item() for s, free in zip(slope, unbounded, strict=True) if free] == [True] * sum(unbounded)


@pytest.mark.parametrize("name", SMOOTH)
def test_inverse_undoes_f_prime(name):
    divergence = divergences.get(name)
    log_u = torch.tensor(
        [-29.0, -9.0, -4.0, -1.0, -1e-3, -1e-9, 0.0, 1e-9, 1e-3, 1.0, 4.0, 9.0, 29.0], dtype=torch.float64
    )
    back = divergence.f_prime_inverse(divergence.f_prime(log_u))
    # Where f' saturates, log u is only as good as f'(u) - f'(end): compare through the slope.
    x = log_u.clone().requires_grad_()
    (slope,) = torch.autograd.grad(divergence.f_prime(x).sum(), x)
    y = divergence.f_prime(log_u).abs()
    tolerance = 1e-12 * log_u.abs() + 8e-16 * (y + y.sign()) / slope
    kept = tolerance < 0.1  # elsewhere y has rounded to the end of its range, and log u is lost
    assert kept.sum() >= 11
    assert ((back - log_u).abs() <= tolerance)[kept].all()


def test_conjugate_is_the_supremum(divergence):
    u = torch.linspace(-25, 25, 400001, dtype=torch.float64)
    low = max(divergence.f_prime_at_zero, -3.0) + 0.05
    high = min(divergence.f_prime_at_infinity, 2.0) - 0.05
    for y in torch.linspace(low, high, 9, dtype=torch.float64):
        supremum = (u.exp() * y - divergence.f(u)).max()
        assert divergence.conjugate(y).item() == pytest.approx(supremum.item(), abs=2e-7)


def test_conjugate_outside_the_range(divergence):
    if math.isfinite(divergence.f_prime_at_infinity):
        beyond = torch.tensor(divergence.f_prime_at_infinity + 0.01)
        assert divergence.conjugate(beyond).item() == math.inf
    if math.isfinite(divergence.f_prime_at_zero):
        below = torch.tensor(divergence.f_prime_at_zero - 2.0, dtype=torch.float64)
        f_at_zero = divergence.f(torch.tensor(-600.0, dtype=torch.float64))
        assert divergence.conjugate(below).item() == pytest.approx(-f_at_zero.item(), rel=1e-9)


@pytest.mark.parametrize("name", SMOOTH)
def test_derivative_of_the_conjugate_is_the_maximiser(name):
    divergence = divergences.get(name)
    y = divergence.f_prime(torch.tensor([-1.5, -0.2, 0.4, 1.1], dtype=torch.float64))
    h = 1e-6 * min(1, divergence.second_derivative_at_one)
    slope = (divergence.conjugate(y + h) - divergence.conjugate(y - h)) / (2 * h)
    torch.testing.assert_close(slope, divergence.f_prime_inverse(y).exp(), rtol=1e-6, atol=0)


@given(st.lists(st.floats(-6, 6), min_size=2, max_size=12), st.lists(st.floats(-6, 6), min_size=2, max_size=12))
@settings(max_examples=40, deadline=None)
def test_divergence_is_positive_and_zero_only_at_the_reference(policy_logits, reference_logits):
    n = min(len(policy_logits), len(reference_logits))
    log_p = torch.tensor(policy_logits[:n], dtype=torch.float64).log_softmax(-1)
    log_q = torch.tensor(reference_logits[:n], dtype=torch.float64).log_softmax(-1)
    for name in NAMES:
        divergence = divergences.get(name)
        assert (log_q.exp() * divergence.f(torch.zeros_like(log_q))).sum() == 0
        value = (log_q.exp() * divergence.f(log_p - log_q)).sum()
        # Pinsker-like: every one of these is bounded below by a multiple of the squared total variation
        # (generalized_js by 2 b (1-b) of it).
        distance = 0.5 * (log_p.exp() - log_q.exp()).abs().sum()
        assert value >= min(0.1, 1.2 * divergence.second_derivative_at_one) * distance**2 - 1e-15
