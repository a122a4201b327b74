"""The gradient is the gradient of the divergence that was named: every estimator's exact mean, by enumeration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from falign import divergences
from falign.divergences import estimators
from tests.conformance.exact import EXACT
from tests.reference.world import WORLD, random_logits, sequence_logprobs, token_logprobs

NAMES = [*(name for name in EXACT if not name.startswith("alpha")), "alpha(0.3)", "alpha(-0.4)", "alpha(1.7)"]
REFERENCE = random_logits(1)
OLD = random_logits(2)


@pytest.fixture(params=NAMES)
def divergence(request):
    return divergences.get(request.param)


@pytest.fixture
def logits() -> Tensor:
    return random_logits(0).requires_grad_()


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return result


def textbook_sequence_divergence(divergence, logits: Tensor) -> Tensor:
    """``Σ_y π_ref(y) f(π(y)/π_ref(y))`` by enumeration."""
    log_ref = sequence_logprobs(REFERENCE)
    return (log_ref.exp() * divergence.f(sequence_logprobs(logits) - log_ref)).sum()


def divergence_at_prefixes(divergence, logits: Tensor) -> Tensor:
    """``D_f(π(·|s)‖π_ref(·|s))`` for each prefix s."""
    log_p, log_q = logits.log_softmax(-1), REFERENCE.log_softmax(-1)
    return (log_q.exp() * divergence.f(log_p - log_q)).sum(-1)


def textbook_token_divergence(divergence, logits: Tensor, law: Tensor) -> Tensor:
    """``E_law[Σ_t D_f(π(·|s_t)‖π_ref(·|s_t))]``; differentiated in the prefixes' law only if that is the policy's."""
    per_token = divergence_at_prefixes(divergence, logits)[WORLD.prefix].masked_fill(~WORLD.mask, 0.0)
    return (sequence_logprobs(law).exp() * per_token.sum(-1)).sum()


def test_value_estimates_average_to_the_divergence(divergence, logits):
    log_ref, log_p = sequence_logprobs(REFERENCE), sequence_logprobs(logits)
    exact = textbook_sequence_divergence(divergence, logits)
    on_policy = (log_p.exp() * estimators.value_from_policy(divergence, log_p - log_ref)).sum()
    on_reference = (log_ref.exp() * estimators.value_from_reference(divergence, log_p - log_ref)).sum()
    torch.testing.assert_close(on_policy, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(on_reference, exact, rtol=1e-12, atol=0)
    assert not estimators.value_from_policy(divergence, log_p - log_ref).requires_grad


def test_reference_samples_give_the_exact_gradient(divergence, logits):
    log_ref, log_p = sequence_logprobs(REFERENCE), sequence_logprobs(logits)
    loss = (log_ref.exp() * estimators.loss_from_reference(divergence, log_p - log_ref)).sum()
    torch.testing.assert_close(
        gradient(loss, logits), gradient(textbook_sequence_divergence(divergence, logits), logits)
    )


def test_old_samples_with_a_reference_weight_give_the_exact_gradient(divergence, logits):
    log_ref, log_p, log_old = (sequence_logprobs(x) for x in (REFERENCE, logits, OLD))
    weight = (log_ref - log_old).exp()
    loss = (log_old.exp() * estimators.loss_from_reference(divergence, log_p - log_ref, importance_weight=weight)).sum()
    torch.testing.assert_close(
        gradient(loss, logits), gradient(textbook_sequence_divergence(divergence, logits), logits)
    )


@pytest.mark.parametrize("off_policy", [False, True])
def test_policy_samples_give_the_exact_sequence_gradient(divergence, logits, off_policy):
    old = OLD if off_policy else logits.detach()
    loss = estimators.loss_from_policy(
        divergence,
        token_logprobs(logits),
        token_logprobs(REFERENCE),
        WORLD.mask,
        old_logprobs=token_logprobs(old) if off_policy else None,
    )
    mean = (sequence_logprobs(old).exp() * loss).sum()
    torch.testing.assert_close(
        gradient(mean, logits), gradient(textbook_sequence_divergence(divergence, logits), logits)
    )


@pytest.mark.parametrize("credit", ["fixed_prefix", "returns"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_policy_samples_give_the_exact_token_gradient(divergence, logits, credit, off_policy):
    old = OLD if off_policy else logits.detach()
    loss = estimators.loss_from_policy(
        divergence,
        token_logprobs(logits),
        token_logprobs(REFERENCE),
        WORLD.mask,
        level="token",
        credit=credit,
        old_logprobs=token_logprobs(old) if off_policy else None,
    )
    mean = (sequence_logprobs(old).exp() * loss).sum()
    law = logits if credit == "returns" else logits.detach()
    torch.testing.assert_close(
        gradient(mean, logits), gradient(textbook_token_divergence(divergence, logits, law), logits)
    )


def test_full_vocabulary_is_the_exact_value_and_gradient(divergence, logits):
    exact = divergence_at_prefixes(divergence, logits)
    value = estimators.full_vocabulary(divergence, logits.log_softmax(-1), REFERENCE.log_softmax(-1))
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(value.sum(), logits), gradient(exact.sum(), logits))


@pytest.mark.parametrize("credit", ["fixed_prefix", "returns"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_full_vocabulary_on_policy_prefixes_is_the_exact_token_divergence(divergence, logits, credit, off_policy):
    old = OLD if off_policy else logits.detach()
    loss = estimators.loss_from_vocabulary(
        divergence_at_prefixes(divergence, logits)[WORLD.prefix],
        token_logprobs(logits),
        WORLD.mask,
        credit=credit,
        old_logprobs=token_logprobs(old) if off_policy else None,
    )
    mean = (sequence_logprobs(old).exp() * loss).sum()
    exact = textbook_token_divergence(divergence, logits, logits if credit == "returns" else logits.detach())
    torch.testing.assert_close(mean, exact)
    torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits))


def test_full_vocabulary_keeps_small_probabilities_exact(divergence):
    log_q = torch.tensor([-80.0, 0.0], dtype=torch.float64).log_softmax(-1)
    log_p = torch.tensor([2.0, 0.0], dtype=torch.float64).log_softmax(-1)
    value = estimators.full_vocabulary(divergence, log_p.float(), log_q.float())
    from mpmath import exp, mpf

    p, q = [exp(mpf(x)) for x in log_p.tolist()], [exp(mpf(x)) for x in log_q.tolist()]
    exact = sum(b * EXACT[divergence.name][0](a / b) for a, b in zip(p, q, strict=True))
    if exact < 1e9:  # where the summand itself is huge (χ² and its kin), float32 follows the tangent line instead
        assert value.item() == pytest.approx(float(exact), rel=1e-5)
    assert torch.isfinite(value)


def test_tokens_of_probability_zero_are_finite_and_count_as_they_should():
    log_p, log_q = torch.tensor([0.5, 0.5, 0.0, 0.0]).log(), torch.tensor([0.5, 0.0, 0.5, 0.0]).log()
    js = estimators.full_vocabulary(divergences.get("jensen_shannon"), log_p, log_q)
    # Twice JSD: m = (1/2, 1/4, 1/4), so KL(p‖m) = KL(q‖m) = (log 2)/2.
    assert js.item() == pytest.approx(0.6931472, rel=1e-5)
    assert estimators.full_vocabulary(divergences.get("total_variation"), log_p, log_q).item() == pytest.approx(0.5)
    for name in NAMES:
        assert torch.isfinite(estimators.full_vocabulary(divergences.get(name), log_p, log_q))


# As b goes to 0, JS_b / b goes to the reverse KL.
ITS_LIMITS = ("reverse_kl", "generalized_js(1e-06)", "generalized_js(1e-12)")


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ITS_LIMITS])
def test_sequence_and_token_level_differ_for_every_f_but_reverse_kl(name, logits):
    divergence = divergences.get(name)
    whole = textbook_sequence_divergence(divergence, logits)
    by_token = textbook_token_divergence(divergence, logits, logits)
    assert abs(whole - by_token) > 1e-3 * whole


def test_reverse_kl_decomposes_over_tokens(logits):
    divergence = divergences.get("reverse_kl")
    torch.testing.assert_close(
        textbook_sequence_divergence(divergence, logits), textbook_token_divergence(divergence, logits, logits)
    )


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_baseline_of_each_completion_changes_nothing_off_policy(divergence, logits, level):
    """Of other completions, that is: a constant here."""
    arguments = (divergence, token_logprobs(logits), token_logprobs(REFERENCE), WORLD.mask)
    means = [
        (
            sequence_logprobs(OLD).exp()
            * estimators.loss_from_policy(
                *arguments,
                level=level,
                old_logprobs=token_logprobs(OLD),
                baseline=torch.full((len(WORLD.mask),), constant, dtype=torch.float64),
            )
        ).sum()
        for constant in (0.0, 0.7)
    ]
    torch.testing.assert_close(gradient(means[1], logits), gradient(means[0], logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", ["sequence", "token", "returns"])
def test_penalties_are_finite_whatever_the_ratios(divergence, level, dtype):
    extremes = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 3.0], [1e4, 1e4, -300.0]], dtype=dtype)
    choice = {"level": "token", "credit": "returns"} if level == "returns" else {"level": level}
    mask = torch.ones(3, 3, dtype=torch.bool)
    for importance in (extremes, -extremes, extremes.flip(-1)):
        penalty = estimators.penalty_from_policy(divergence, extremes, mask, importance_log_ratio=importance, **choice)
        assert torch.isfinite(penalty).all()


def test_a_baseline_changes_nothing(divergence, logits):
    penalty = estimators.penalty_from_policy(divergence, token_logprobs(logits) - token_logprobs(REFERENCE), WORLD.mask)
    law = sequence_logprobs(logits).exp().detach()
    with_baseline = (law * ((penalty - 0.7) * token_logprobs(logits)).masked_fill(~WORLD.mask, 0.0).sum(-1)).sum()
    torch.testing.assert_close(
        gradient(with_baseline, logits), gradient(textbook_sequence_divergence(divergence, logits), logits)
    )


def test_the_peers_k3_loss_has_the_gradient_of_the_other_kl(logits):
    """Why the estimators are named by use: differentiating a value estimate on policy samples is a wrong gradient."""
    log_p, log_ref = sequence_logprobs(logits), sequence_logprobs(REFERENCE)
    log_u = log_p - log_ref
    k3 = (-log_u).exp() - 1 + log_u
    k3_as_loss = gradient((log_p.exp().detach() * k3).sum(), logits)
    forward, reverse = (
        gradient(textbook_sequence_divergence(divergences.get(name), logits), logits)
        for name in ("forward_kl", "reverse_kl")
    )
    torch.testing.assert_close(k3_as_loss, forward)
    assert (k3_as_loss - reverse).abs().max() > 0.05


def test_padding_and_values_outside_the_mask_change_nothing(divergence, logits):
    mask = torch.nn.functional.pad(WORLD.mask, (0, 2))
    padded = [torch.nn.functional.pad(token_logprobs(x), (0, 2), value=float("nan")) for x in (logits, REFERENCE)]
    for level in ("sequence", "token"):
        expected = estimators.loss_from_policy(
            divergence, token_logprobs(logits), token_logprobs(REFERENCE), WORLD.mask, level=level
        )
        loss = estimators.loss_from_policy(divergence, *padded, mask, level=level)
        torch.testing.assert_close(loss, expected)
        assert torch.isfinite(gradient(loss.sum(), logits)).all()


def test_returns_at_sequence_level_are_refused():
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="no later prefixes"):
        estimators.penalty_from_policy(divergences.get("js"), x, mask, credit="returns")
    with pytest.raises((ValueError, TypeError), match="credit"):
        estimators.loss_from_vocabulary(x, x, mask, credit="all")


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "pearson_chi2", "alpha(0.3)"])
def test_the_divergence_over_the_vocabulary_is_differentiable_twice(name):
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    reference = reference.log_softmax(-1)
    divergence = divergences.get(name)

    def value(z):
        return estimators.full_vocabulary(divergence, z.log_softmax(-1), reference)

    assert torch.autograd.gradgradcheck(value, logits.requires_grad_())


def test_a_token_that_both_exclude_changes_no_gradient():
    reference = torch.tensor([[0.2, 0.8]], dtype=torch.float64)
    p = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    divergence = divergences.get("jensen_shannon")
    found = []
    for pair in ((p, reference), (torch.cat([p, nothing], -1), torch.cat([reference, nothing], -1))):
        policy, other = (each.log() for each in pair)
        value = estimators.full_vocabulary(divergence, policy.requires_grad_(), other)
        found.append((value, torch.autograd.grad(value.sum(), policy)[0][:, :2]))
    torch.testing.assert_close(found[1], found[0])
