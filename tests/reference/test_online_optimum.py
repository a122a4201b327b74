"""Where the online objectives lead: exact expectations, followed to the end, arrive at the closed-form optimum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from falign import CompletionBatch, divergences
from falign.divergences import optimal_weights
from falign.objectives import BinaryConstraint, DistributionMatching, ExponentialReward, PolicyGradient

# One token decides. The reference is a list of samples, so that optimal_weights can take each as often as it comes.
COUNTS = torch.tensor([1, 2, 3, 4, 6, 4])
LOG_REF = (COUNTS / COUNTS.sum()).double().log()
REWARDS = torch.tensor([1.2, -0.3, 0.4, 0.0, 0.8, -1.0], dtype=torch.float64)
BETA, N = 0.7, len(COUNTS)
SMOOTH = [  # total variation has a kink at the optimum, where no gradient vanishes
    *("reverse_kl", "forward_kl", "jensen_shannon", "jeffreys", "squared_hellinger", "pearson_chi2", "neyman_chi2"),
    *("chi2_kl", "le_cam", "alpha(0.3)", "alpha(-0.4)", "alpha(1.7)", "generalized_js(0.2)"),
]


def outcomes(logits: Tensor, **given) -> CompletionBatch:
    return CompletionBatch(
        logprobs=logits.log_softmax(-1)[:, None],
        reference_logprobs=LOG_REF[:, None],
        completion_mask=torch.ones(N, 1, dtype=torch.bool),
        prompt_index=torch.arange(N),
        **given,
    )


def follow(objective, value, **given) -> Tensor:
    """The policy at the end of L-BFGS, with the objective's exact mean gradient over its own samples.

    ``value`` is the quantity itself, by which steps are sized: were the gradient not its own, no step would fit.
    """
    logits = LOG_REF.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=60, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        drawn = logits.softmax(-1).detach()
        mean = (drawn * objective(outcomes(logits, **given)).terms[0].losses).sum()
        (logits.grad,) = torch.autograd.grad(mean, logits)
        return value(logits.detach().log_softmax(-1))

    optimizer.step(closure)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-5
    return logits.softmax(-1).detach()


@pytest.mark.parametrize("name", SMOOTH)
def test_the_policy_gradient_arrives_at_the_optimum(name):
    divergence = divergences.get(name).standardized()
    weights = optimal_weights(REWARDS.repeat_interleave(COUNTS), divergence, BETA)
    expected = torch.zeros(N, dtype=torch.float64).index_add(0, torch.arange(N).repeat_interleave(COUNTS), weights / 20)
    assert (expected - LOG_REF.exp()).abs().max() > 0.05  # the optimum is a different policy
    if name == "reverse_kl":
        torch.testing.assert_close(expected, (LOG_REF + REWARDS / BETA).softmax(0))

    def value(log_pi: Tensor) -> Tensor:
        return BETA * (LOG_REF.exp() * divergence.f(log_pi - LOG_REF)).sum() - (log_pi.exp() * REWARDS).sum()

    policy = follow(PolicyGradient(divergence, BETA, "none"), value, rewards=REWARDS)
    torch.testing.assert_close(policy, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SMOOTH)
def test_f_dpg_arrives_at_the_target_under_every_divergence(name):
    divergence = divergences.get(name)
    log_p = (LOG_REF + REWARDS / BETA).log_softmax(0)
    log_z = (LOG_REF + REWARDS / BETA).logsumexp(0).expand(N)

    def value(log_pi: Tensor) -> Tensor:
        return (log_p.exp() * divergence.f(log_pi - log_p)).sum()

    objective = DistributionMatching(divergence, ExponentialReward(BETA), "none")
    policy = follow(objective, value, features=REWARDS[:, None], log_partition=log_z)
    torch.testing.assert_close(policy, log_p.exp(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "squared_hellinger", "alpha(0.3)", "le_cam"])
def test_f_dpg_gives_up_what_a_binary_target_forbids(name):
    divergence, allowed = divergences.get(name), REWARDS > 0
    log_p = torch.where(allowed, LOG_REF, -math.inf).log_softmax(0)
    log_z = LOG_REF[allowed].logsumexp(0).expand(N)

    def value(log_pi: Tensor) -> Tensor:
        inside = (log_p.exp() * divergence.f(torch.where(allowed, log_pi - log_p, 0.0))).sum()
        return inside + divergence.f_prime_at_infinity * log_pi[~allowed].exp().sum()

    objective = DistributionMatching(divergence, BinaryConstraint(), "none")
    policy = follow(objective, value, features=allowed.double()[:, None], log_partition=log_z)
    assert policy[~allowed].sum() < 1e-3
    torch.testing.assert_close(policy, log_p.exp(), rtol=0, atol=2e-3)
