"""One rule of dtypes for every public function of the mathematics, and NaN that nothing swallows."""

from __future__ import annotations

import math

import pytest
import torch

from falign import divergences
from falign.divergences import estimators, optimal_weights
from falign.divergences.base import numbers
from falign.objectives import (
    BinaryConstraint,
    ExponentialReward,
    MomentConstraints,
    ProductTarget,
    completion_term,
    fit_moments,
    get_advantage,
    get_margin_loss,
    log_partition,
)
from falign.objectives.advantages import ADVANTAGES, generalized_advantages, group_deviation
from falign.objectives.groups import (
    accuracies,
    groups_of,
    logsumexp_of_others,
    mean_of_others,
    pairs_of,
    smallest,
    total,
)
from tests.conformance.exact import EXACT

INTEGERS = [torch.int64, torch.int32, torch.uint8, torch.bool]
PROMPTS = torch.tensor([0, 0, 0, 1, 1, 1])
MASK = torch.tensor([[True, True, True], [True, True, False]])
GROUPS = groups_of(PROMPTS)
JS, CHI2 = divergences.get("jensen_shannon"), divergences.get("pearson_chi2")

# Of six numbers 0 and 1, or a table (2, 3) of them.
FUNCTIONS = {
    **{f"advantage {name}": lambda x, name=name: get_advantage(name)(x, PROMPTS) for name in ADVANTAGES.names()},
    "group_deviation": lambda x: group_deviation(x, PROMPTS),
    "generalized_advantages": lambda x: generalized_advantages(x[:2], x.view(2, 3), MASK, 0.9, 0.8),
    "total": lambda x: total(x, GROUPS),
    "smallest": lambda x: smallest(x, GROUPS),
    "mean_of_others": lambda x: mean_of_others(x, GROUPS),
    "logsumexp_of_others": lambda x: logsumexp_of_others(x, GROUPS),
    **{
        f"margin {name}": lambda x, name=name: get_margin_loss(name)(x)
        for name in ("logistic", "hinge", "squared", "conservative", "robust", "exo")
    },
    "optimal_weights": lambda x: optimal_weights(x, JS, 0.7),
    "optimal_weights without a barrier": lambda x: optimal_weights(x, CHI2, 0.2),
    "fit_moments": lambda x: fit_moments(x.view(6, 1), [0.3]),
    "fit_moments of weighted samples": lambda x: fit_moments(torch.arange(6).view(6, 1), [2.2], log_weights=x),
    "moments": lambda x: MomentConstraints((0.7, -0.2, 0.4)).log_score(x.view(2, 3)),
    "reward": lambda x: ExponentialReward(0.3).log_score(x.view(6, 1)),
    "constraint": lambda x: BinaryConstraint().log_score(x.view(6, 1)),
    "product": lambda x: ProductTarget((BinaryConstraint(), ExponentialReward(0.5))).log_score(x.view(3, 2)),
    "log_partition": lambda x: log_partition(x, PROMPTS),
    "completion_term": lambda x: completion_term(x, torch.arange(1, 7), "token_mean").losses,
    "accuracies": accuracies,
    "value_from_policy": lambda x: estimators.value_from_policy(JS, x),
    "value_from_reference": lambda x: estimators.value_from_reference(JS, x),
    "loss_from_reference": lambda x: estimators.loss_from_reference(JS, x, importance_weight=x),
    "penalty_from_policy": lambda x: estimators.penalty_from_policy(
        JS, x.view(2, 3), MASK, level="token", credit="returns", importance_log_ratio=x.view(2, 3)
    ),
    "baseline": lambda x: estimators.penalty_from_policy(JS, x.view(2, 3), MASK, baseline=x[:2]),
    "loss_from_policy": lambda x: estimators.loss_from_policy(JS, x.view(2, 3), torch.zeros(2, 3), MASK),
    "loss_from_vocabulary": lambda x: estimators.loss_from_vocabulary(
        x.view(2, 3), torch.ones(2, 3), MASK, old_logprobs=x.view(2, 3)
    ),
    "full_vocabulary": lambda x: estimators.full_vocabulary(JS, torch.full((2, 3), 1 / 3).log(), x.view(2, 3)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_integers_and_booleans_are_taken_as_numbers(name):
    function, x = FUNCTIONS[name], torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    expected = function(x)
    for dtype in INTEGERS:
        actual = function(x.to(dtype))
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if "moments" not in n])
def test_half_precision_is_computed_in_float32(name):
    function, x = FUNCTIONS[name], torch.tensor([1.25, 0.0, 1.5, 0.0, 0.375, 1.0])
    for dtype in (torch.bfloat16, torch.float16):
        actual = function(x.to(dtype))
        assert actual.dtype in (torch.float32, torch.float64)
        assert torch.equal(actual, function(x))


@pytest.mark.parametrize("name", EXACT)
def test_methods_of_a_divergence_take_integers(name):
    divergence, x = divergences.get(name), torch.tensor([-2, 0, 3])
    for method in (divergence.f, divergence.f_prime, divergence.f_prime_inverse, divergence.conjugate):
        assert torch.equal(method(x), method(x.float()))
        assert torch.equal(method(x > 0), method((x > 0).float()))


@pytest.mark.parametrize("name", [*EXACT, "standardized(jensen_shannon)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nan_is_seen_by_every_method_of_every_divergence(name, dtype):
    divergence, x = divergences.get(name), torch.tensor([0.5, math.nan], dtype=dtype)
    for method in (divergence.f, divergence.f_prime, divergence.f_prime_inverse, divergence.conjugate):
        assert method(x).isnan().tolist() == [False, True], method
    assert estimators.value_from_policy(divergence, x).isnan().tolist() == [False, True]
    # Two positions of three tokens: one has NaN in the policy, and a token that neither can produce is no NaN.
    logprobs = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], dtype=dtype).log()
    for place in ((1, 0), (1, 2)):
        policy = logprobs.clone()
        policy[place] = math.nan
        value = estimators.full_vocabulary(divergence, policy, logprobs)
        assert value.isnan().tolist() == [False, True]
        value = estimators.full_vocabulary(divergence, logprobs, policy)
        assert value.isnan().tolist() == [False, True]


def test_the_reference_and_the_old_policy_are_constants_of_every_estimator():
    logits = torch.tensor([[[0.3, -0.1, 0.8]]], dtype=torch.float64, requires_grad=True)
    logprobs, mask = logits.log_softmax(dim=-1), torch.ones(1, 3, dtype=torch.bool)
    loss = estimators.full_vocabulary(JS, logprobs, logprobs * 1.1)
    (slope,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    constant = estimators.full_vocabulary(JS, logprobs, (logprobs * 1.1).detach())
    (expected,) = torch.autograd.grad(constant.sum(), logits, retain_graph=True)
    assert torch.equal(slope, expected)

    tokens = logprobs[0]
    loss = estimators.loss_from_vocabulary(torch.ones_like(tokens), tokens, mask, credit="returns", old_logprobs=tokens)
    (slope,) = torch.autograd.grad(loss.sum(), tokens, retain_graph=True)
    assert slope.tolist() == [[2.0, 1.0, 0.0]]
    loss = estimators.loss_from_policy(JS, tokens, tokens * 1.1, mask, old_logprobs=tokens)
    (slope,) = torch.autograd.grad(loss.sum(), tokens)
    assert slope.abs().min() > 0
    advantages = generalized_advantages(torch.ones(1), tokens, mask, 1.0, 1.0)
    assert not advantages.requires_grad


def test_nan_is_no_constraint_that_fails():
    assert BinaryConstraint().log_score(torch.tensor([[math.nan], [0.0], [1.0]])).isnan().tolist() == [
        *(True, False, False)
    ]


def test_nan_has_no_result_and_no_preference():
    assert accuracies(torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match=r"preference\[1\] is NaN"):
        pairs_of(torch.tensor([1.0, math.nan]), torch.tensor([0, 0]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_has_no_optimal_weight(value):
    with pytest.raises(ValueError, match=r"rewards\[1, 0\] is .*finite"):
        optimal_weights(torch.tensor([[0.0, 1.0], [value, 2.0]]), JS, 1.0)
    with pytest.raises(ValueError, match=r"features .*NaN or infinite"):
        fit_moments(torch.tensor([[0.0], [value], [1.0]]), [0.5])


def test_autocast_changes_no_score():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(40, 6, generator=generator)
    target = ProductTarget((MomentConstraints((0.123456, 1.7654321, -2.3456789, 0.3, 0.7)), ExponentialReward(0.3)))
    expected = target.log_score(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(target.log_score(features), expected)


def test_numbers_follow_the_default_dtype():
    old = torch.get_default_dtype()
    try:
        for default, expected in {torch.float64: torch.float64, torch.bfloat16: torch.float32}.items():
            torch.set_default_dtype(default)
            assert numbers(torch.tensor([1]), "x").dtype == expected
    finally:
        torch.set_default_dtype(old)
    with pytest.raises(TypeError, match=r"rewards has dtype torch.complex64; it must be real"):
        numbers(torch.zeros(1, dtype=torch.complex64), "rewards")
