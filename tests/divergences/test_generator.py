import math

import pytest
import torch
import torch.nn.functional as F
from mpmath import mp, mpf, sqrt

from falign import divergences
from falign.divergences import estimators, from_generator, optimal_weights
from falign.methods import FDPO, TDPO
from falign.objectives import CompletionBatch

mp.dps = 60

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


def alpha_of_a_user(a):
    return lambda u: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))


# name -> f, the built-in family that it is, and the limits of f' and of f°' where there is none.
FORMS = {
    "neyman_chi2": (lambda u: (1 - u) ** 2 / u, "neyman_chi2"),
    "total_variation": (lambda u: (u - 1).abs() / 2, "total_variation"),
    "le_cam": (lambda u: (u - 1) ** 2 / (u + 1), "le_cam"),
    "alpha(1.5)": (alpha_of_a_user(1.5), "alpha(1.5)"),
    "alpha(1.05)": (alpha_of_a_user(1.05), "alpha(1.05)"),
    "alpha(0.3)": (alpha_of_a_user(0.3), "alpha(0.3)"),
    "forward_kl": (lambda u: u - 1 - torch.log(u), "forward_kl"),
    "reverse_kl": (lambda u: u * torch.log(u), "reverse_kl"),
    "jeffreys": (lambda u: (u - 1) * torch.log(u), "jeffreys"),
    "jensen_shannon": (OWN["jensen_shannon"], "jensen_shannon"),
    "squared_hellinger": (lambda u: (torch.sqrt(u) - 1) ** 2, "squared_hellinger"),
    "chi2_kl": (lambda u: (u - 1) ** 2 / 2 + u * torch.log(u), "chi2_kl"),
}
ROOT = 1 / math.sqrt(2)
SIGMOID = 1 / (1 + math.exp(-1))
LIMITS = {  # f'(0+), f'(∞), f°'(0+), f°'(∞) of the normal form
    "root": (lambda u: torch.sqrt(1 + u**2), (-ROOT, 1 - ROOT, -ROOT, 1 - ROOT)),
    "softplus": (
        F.softplus,
        (
            *(0.5 - SIGMOID, 1 - SIGMOID),
            *(SIGMOID - math.log1p(math.e), math.log(2) + SIGMOID - math.log1p(math.e)),
        ),
    ),
    "huber": (lambda u: F.huber_loss(u, torch.ones_like(u), reduction="none"), (-1, 1, -1.5, 0.5)),
    "two slopes": (lambda u: torch.maximum(u - 1, 2 * (1 - u)), (-1.5, 1.5, -1.5, 1.5)),
    "two parabolas": (lambda u: torch.where(u > 1, (u - 1) ** 2, (u - 1) ** 2 / 2), (-1, math.inf, -math.inf, 0.5)),
    "fourth power": (lambda u: (u - 1) ** 4, (-4, math.inf, -math.inf, 1)),
}
WIDE = torch.linspace(-30, 30, 121, dtype=torch.float64)
FAR = torch.tensor([-1e4, -300.0, -31.0, 31.0, 300.0, 1e4])


@pytest.mark.parametrize("name", FORMS)
def test_any_form_of_a_family_has_its_dual_and_all_limits(name):
    f, family = FORMS[name]
    own, built_in = from_generator(f, name="own"), divergences.get(family)
    for mine, other in ((own, built_in), (own.dual(), built_in.dual())):
        # alpha(1.05) comes to its limit of 20 as u^-0.05, which has to be extrapolated.
        assert mine.f_prime_at_zero == pytest.approx(other.f_prime_at_zero, rel=1e-6)
        assert mine.f_prime_at_infinity == pytest.approx(other.f_prime_at_infinity, rel=1e-7)
        assert mine.has_barrier == other.has_barrier
        torch.testing.assert_close(mine.f(WIDE), other.f(WIDE), rtol=1e-9, atol=1e-12)
        # f°' of a dual is a difference of large numbers in f; near its end its tangent line takes over.
        torch.testing.assert_close(
            mine.f_prime(WIDE), other.f_prime(WIDE), rtol=4e-3 if mine is not own else 1e-9, atol=1e-9
        )
        moderate = WIDE[WIDE.abs() <= 12]
        torch.testing.assert_close(mine.f_prime(moderate), other.f_prime(moderate), rtol=1e-7, atol=1e-9)
    values = estimators.value_from_policy(built_in, WIDE)
    torch.testing.assert_close(estimators.value_from_policy(own, WIDE), values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_generators_that_are_in_no_family(name):
    f, limits = LIMITS[name]
    own = from_generator(f, name=name)
    dual = own.dual()
    ends = (own.f_prime_at_zero, own.f_prime_at_infinity, dual.f_prime_at_zero, dual.f_prime_at_infinity)
    assert ends == pytest.approx(limits, rel=1e-7)
    f_of_v = torch.exp(WIDE) * own.f(-WIDE)
    torch.testing.assert_close(dual.f(WIDE), f_of_v, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [*FORMS, *LIMITS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_generators_and_duals_are_finite_and_monotone_everywhere(name, dtype):
    f = {**FORMS, **LIMITS}[name][0]
    own = from_generator(f, name=name)
    for mine in (own, own.dual()):
        log_u = torch.cat([torch.linspace(-40, 40, 161), FAR]).sort().values.to(dtype).requires_grad_()
        for method in (mine.f, mine.f_prime):
            value = method(log_u)
            assert torch.isfinite(value).all()
            (slope,) = torch.autograd.grad(value.float().sum(), log_u)
            assert torch.isfinite(slope).all()
        rise = mine.f_prime(log_u).detach().double().diff()
        assert (rise >= -1e-5 * (1 + mine.f_prime(log_u).detach().double()[1:].abs())).all()


def test_the_root_and_its_dual_have_sixty_digits_of_agreement():
    own = from_generator(LIMITS["root"][0], name="root")
    for x in (-25.0, -7.0, -0.5, 0.3, 4.0, 25.0):
        u, at_one = mp.exp(x), sqrt(mpf(2))

        def exact(v, at_one=at_one):
            return sqrt(1 + v**2) - at_one - (v - 1) / at_one

        at = torch.tensor([x], dtype=torch.float64)
        assert own.f(at).item() == pytest.approx(float(exact(u)), rel=1e-10)
        assert own.dual().f(at).item() == pytest.approx(float(u * exact(1 / u)), rel=1e-10)
        assert own.f_prime(at).item() == pytest.approx(float(u / sqrt(1 + u**2) - 1 / at_one), rel=1e-10)


@pytest.mark.parametrize("name", ["neyman_chi2", "total_variation", "le_cam", "alpha(1.5)", "forward_kl"])
def test_own_generators_work_over_the_vocabulary_where_a_ratio_passes_ten_nats(name):
    f, family = FORMS[name]
    own, built_in = from_generator(f, name="own"), divergences.get(family)
    logits = torch.tensor([[25.0, 0.0, -3.0, -28.0], [0.0, 1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-4.0, 0.0, 3.0, 1.0], [3.0, 2.0, 1.0, 0.0]], dtype=torch.float64).log_softmax(-1)
    found = []
    for divergence in (own, built_in):
        value = estimators.full_vocabulary(divergence, logits.log_softmax(-1), reference)
        (slope,) = torch.autograd.grad(value.sum(), logits)
        found.append((value.detach(), slope))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)
    batch = CompletionBatch(
        logprobs=torch.tensor([[-1.0], [-20.0]], requires_grad=True),
        reference_logprobs=torch.tensor([[-19.0], [-1.0]]),
        measures={"divergence": found[0][0][:, None].float()},
        completion_mask=torch.ones(2, 1, dtype=torch.bool),
        prompt_index=torch.tensor([0, 0]),
        preference=torch.tensor([1, 0]),
    )
    assert torch.isfinite(TDPO(own)(batch).mean())


def test_the_reverse_kl_as_a_dual_keeps_its_barrier():
    dual = from_generator(lambda u: u - 1 - torch.log(u), name="own").dual()
    assert dual.f_prime_at_zero == -math.inf
    weights = optimal_weights(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), dual, 1.0)
    exact = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).softmax(0) * 3  # 0.270, 0.734, 1.996
    torch.testing.assert_close(weights, exact, rtol=1e-8, atol=1e-8)
    FDPO(dual)  # which needs the barrier


def test_a_generator_works_under_inference_mode():
    expected = from_generator(FORMS["le_cam"][0], name="own")
    with torch.inference_mode():
        own = from_generator(FORMS["le_cam"][0], name="own")
        x = torch.linspace(-3, 3, 7)
        for mine, other in ((own, expected), (own.dual(), expected.dual())):
            for method in ("f", "f_prime", "f_prime_inverse", "conjugate"):
                assert torch.equal(getattr(mine, method)(x / 4), getattr(other, method)(x / 4))


def test_a_generator_that_is_flat_or_bent_at_one():
    assert from_generator(LIMITS["fourth power"][0], name="flat").second_derivative_at_one == 0.0
    with pytest.raises(ValueError, match=r"flat at u = 1.*f''\(1\) = 0"):
        from_generator(LIMITS["fourth power"][0], name="flat").standardized()
    for kink in ("two slopes", "two parabolas"):
        assert math.isnan(from_generator(LIMITS[kink][0], name="kink").second_derivative_at_one)


def test_a_limit_far_out_is_not_made_up_where_f_overflows():
    # |u - 1|³/(u² + 1): its cubes overflow at e^300, and f'(∞) is 1.
    own = from_generator(lambda u: (u - 1).abs() ** 3 / (u**2 + 1), name="own")
    assert own.f_prime_at_zero == pytest.approx(-3.0)
    assert own.f_prime_at_infinity == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("f", "limits", "message"),
    [
        (lambda u: u**2, {"f_prime_at_zero": -math.inf}, r"f_prime_at_zero=-inf .*contradicts f'.*-2"),
        (lambda u: u * torch.log(u), {"f_prime_at_infinity": 5.0}, r"f_prime_at_infinity=5.0 .*contradicts f'"),
        (lambda u: u.pow(1.01), {"f_prime_at_zero": -0.5, "f_prime_at_infinity": math.inf}, "contradicts f'"),
        (lambda u: u.pow(1.01), {"f_prime_at_zero": math.nan, "f_prime_at_infinity": math.inf}, "contradicts f'"),
        (lambda u: torch.where(u > 1, u - 1, torch.sqrt(u - 2)), {}, "branch that is not taken must be finite"),
        (torch.ones_like, {}, "affine"),
        (lambda u: torch.from_numpy((u.detach().numpy() - 1) ** 2), {}, "not a differentiable torch function"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_made(f, limits, message):
    with pytest.raises(ValueError, match=message):
        from_generator(f, name="own", **limits)


@pytest.mark.parametrize("f", [lambda u: 1.0, lambda u: (u > 1).long(), lambda u: u.float() ** 2])
def test_a_result_of_another_type_is_refused(f):
    with pytest.raises(TypeError, match="must keep tensor and dtype"):
        from_generator(f, name="own")


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
