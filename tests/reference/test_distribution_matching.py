"""f-DPG's mean over all that can be sampled is the gradient of ``D_f(π‖p)``, for every target, by enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from falign import CompletionBatch, divergences
from falign.objectives import (
    BinaryConstraint,
    DistributionMatching,
    ExponentialReward,
    MomentConstraints,
    ProductTarget,
    RunningPartition,
    fit_moments,
)
from tests.reference.test_estimators import NAMES, OLD, REFERENCE, gradient
from tests.reference.world import COMPLETIONS, WORLD, random_logits, sequence_logprobs, token_logprobs

N = len(COMPLETIONS)
LENGTH = torch.tensor([float(len(tokens)) for tokens in COMPLETIONS], dtype=torch.float64)
ONES = torch.tensor([float(tokens.count(1)) for tokens in COMPLETIONS], dtype=torch.float64)
HAS_A_TWO = torch.tensor([float(2 in tokens) for tokens in COMPLETIONS], dtype=torch.float64)
REWARD = torch.randn(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
# target -> (falign's, features, P/π_ref by the paper's formula)
TARGETS = {
    "binary": (BinaryConstraint(), HAS_A_TWO[:, None], HAS_A_TWO),
    "moments": (
        MomentConstraints((0.7, -0.4)),
        torch.stack([ONES, LENGTH], -1),
        torch.exp(0.7 * ONES - 0.4 * LENGTH),
    ),
    "exponential": (ExponentialReward(0.8), REWARD[:, None], torch.exp(REWARD / 0.8)),
    "product": (
        ProductTarget((BinaryConstraint(), MomentConstraints((0.5,)), ExponentialReward(2.0))),
        torch.stack([HAS_A_TWO, ONES, REWARD], -1),
        HAS_A_TWO * torch.exp(0.5 * ONES + REWARD / 2.0),
    ),
}
CASES = [
    (name, target)
    for name in NAMES
    for target in TARGETS
    if not (TARGETS[target][0].has_zeros and math.isinf(divergences.get(name).f_prime_at_infinity))
]
FIRST, SECOND = torch.cartesian_prod(torch.arange(N), torch.arange(N)).unbind(-1)
PAIRS = torch.stack([FIRST, SECOND], dim=-1).flatten()
EACH, PAIR = torch.arange(N), torch.arange(N * N).repeat_interleave(2)


@pytest.fixture
def logits() -> Tensor:
    return random_logits(0).requires_grad_()


def law_of(target: str) -> Tensor:
    """p, normalized by its sum."""
    mass = sequence_logprobs(REFERENCE).exp() * TARGETS[target][2]
    return mass / mass.sum()


def textbook(divergence, logits: Tensor, target: str) -> Tensor:
    """``Σ_{p>0} p f(π/p) + f'(∞) π(p = 0)``."""
    p, log_pi = law_of(target), sequence_logprobs(logits)
    inside = p > 0
    total = (p[inside] * divergence.f(log_pi[inside] - p[inside].log())).sum()
    outside = log_pi[~inside].exp().sum()
    return total + divergence.f_prime_at_infinity * outside if (~inside).any() else total


def samples(logits: Tensor, target: str, rows: Tensor, prompts: Tensor, old: Tensor | None, **given) -> CompletionBatch:
    log_z = (sequence_logprobs(REFERENCE).exp() * TARGETS[target][2]).sum().log()
    fields = {"log_partition": log_z.expand(len(rows)).clone(), **given}
    return CompletionBatch(
        logprobs=token_logprobs(logits)[rows],
        reference_logprobs=token_logprobs(REFERENCE)[rows],
        old_logprobs=None if old is None else token_logprobs(old)[rows],
        completion_mask=WORLD.mask[rows],
        prompt_index=prompts,
        features=TARGETS[target][1][rows],
        **fields,
    )


@pytest.mark.parametrize(("name", "target"), CASES)
@pytest.mark.parametrize("proposal", [False, True])
@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_the_mean_gradient_is_that_of_the_divergence_to_the_target(name, target, proposal, baseline, logits):
    divergence = divergences.get(name)
    objective = DistributionMatching(divergence, TARGETS[target][0], baseline)
    law = sequence_logprobs(OLD if proposal else logits.detach())
    if baseline == "none":
        rows, prompts, drawn = EACH, EACH, law.exp()
    else:
        rows, prompts, drawn = PAIRS, PAIR, (law[FIRST] + law[SECOND]).exp().repeat_interleave(2) / 2
    batch = samples(logits, target, rows, prompts, OLD if proposal else None)
    output = objective(batch)
    mean = (drawn * output.terms[0].losses).sum()
    exact = textbook(divergence, logits, target)
    torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits), rtol=0, atol=1e-8)
    logged = (drawn * output.metrics[f"divergence/{divergence.name}"]).sum()
    torch.testing.assert_close(logged, exact.detach())


def test_the_constant_baseline_is_the_mean_of_all_others_of_the_rollout(logits):
    constant = DistributionMatching(divergences.get("js"), TARGETS["binary"][0], "constant")
    rows, prompts = torch.arange(0, 40, 3), torch.arange(14) // 2
    batch = samples(logits, "binary", rows, prompts, None)
    baseline = constant.prepare(batch).baseline
    pseudo_reward = constant(batch).metrics["pseudo_reward"]
    assert baseline[3].item() == pytest.approx((pseudo_reward.sum() - pseudo_reward[3]).item() / 13)


# Table of methods.md, B.2: f'(t) as in the paper and its code, with t = π/p.
PAPER = {
    "forward_kl": lambda t: -1 / t,
    "reverse_kl": lambda t: torch.log(t) + 1,
    "total_variation": lambda t: torch.where(t > 1, 0.5, -0.5).double(),
    "jensen_shannon": lambda t: torch.log(2 * t / (t + 1)),
    "neyman_chi2": lambda t: 1 - t**-2,
    "pearson_chi2": lambda t: 2 * (t - 1),
}


@pytest.mark.parametrize("name", PAPER)
def test_pseudo_rewards_are_the_papers_up_to_a_constant(name, logits):
    divergence = divergences.get(name)
    output = DistributionMatching(divergence, TARGETS["exponential"][0], "none")(
        samples(logits, "exponential", EACH, EACH, None)
    )
    t = sequence_logprobs(logits).exp() / law_of("exponential")
    difference = output.metrics["pseudo_reward"] + PAPER[name](t.detach())
    torch.testing.assert_close(difference, difference[:1].expand(N), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "total_variation", "squared_hellinger"])
def test_what_the_target_forbids_has_the_pseudo_reward_of_its_limit(name, logits):
    divergence = divergences.get(name)
    batch = samples(logits, "binary", EACH, EACH, None)
    pseudo_reward = DistributionMatching(divergence, BinaryConstraint(), "none")(batch).metrics["pseudo_reward"]
    assert (pseudo_reward[HAS_A_TWO == 0] == -divergence.f_prime_at_infinity).all()


def test_the_running_partition_is_unbiased_over_everything_that_can_be_sampled():
    """``E[Z estimate]`` over all pairs of a proposal's samples, and over a pair after a pair."""
    target, features, score = TARGETS["product"]
    reference, proposal = sequence_logprobs(REFERENCE), sequence_logprobs(OLD)
    exact = (reference.exp() * score).sum()
    batch = samples(random_logits(0), "product", PAIRS, PAIR, OLD)
    log_weights = DistributionMatching(divergences.get("js"), target).log_weights(batch)
    drawn = (proposal[FIRST] + proposal[SECOND]).exp().repeat_interleave(2) / 2
    running = RunningPartition()
    first = running.update(PAIR.tolist(), log_weights)
    torch.testing.assert_close((drawn * first.exp()).sum(), exact)
    # A second pair, the same in every world: by linearity the mean of three terms stays unbiased in the first two.
    again = running.update(PAIR.tolist(), log_weights.flip(0))
    assert torch.isfinite(again[torch.isfinite(first)]).any()
    second = log_weights.flip(0).view(-1, 2).flip(-1).flatten().exp()  # the other one of the second pair
    both = log_weights.exp().view(-1, 2).sum(-1).repeat_interleave(2)
    torch.testing.assert_close(again.exp(), (both + second) / 3)
    assert features.shape[-1] == target.num_features


def test_fitted_moments_are_those_of_the_target_policy():
    """On all completions, each counted by the reference's own probability."""
    features, reference = torch.stack([ONES, LENGTH, HAS_A_TWO], -1), sequence_logprobs(REFERENCE)
    wanted = torch.tensor([1.1, 2.3, 0.5], dtype=torch.float64)
    lambdas = fit_moments(features, wanted, log_weights=reference)
    mass = (reference + features @ lambdas).softmax(0)
    torch.testing.assert_close(mass @ features, wanted, rtol=0, atol=1e-7)
    # Among laws with these moments it is the nearest in KL: exponential tilting is the only stationary point.
    assert (mass * (mass.log() - reference)).sum() < 1.0
