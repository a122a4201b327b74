"""Group-level objectives on the enumerated world: gradients of expectations over groups, limits, and fixed points."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from falign import divergences
from falign.methods import BestOfN, DisCO
from falign.objectives import Cloning, CompletionBatch, Discriminative, TrustRegion
from tests.reference.test_estimators import NAMES
from tests.reference.world import COMPLETIONS, WORLD, random_logits, sequence_logprobs, token_logprobs

OLD = random_logits(1, 0.5)
LENGTHS = WORLD.mask.sum(dim=-1)
PASSED = torch.tensor([sum(tokens) % 2 == 0 for tokens in COMPLETIONS])
N = len(COMPLETIONS)


def groups(size, *, among=N):
    """All ordered groups of completions, (groups, size), and the probability of each under π_old."""
    rows = torch.tensor(list(itertools.product(range(among), repeat=size)))
    law = sequence_logprobs(OLD)[:among].log_softmax(-1)
    return rows, law[rows].sum(dim=-1).exp()


def batch_of(rows, logits, rewards):
    flat = rows.flatten()
    return CompletionBatch(
        logprobs=token_logprobs(logits)[flat],
        old_logprobs=token_logprobs(OLD)[flat],
        completion_mask=WORLD.mask[flat],
        prompt_index=torch.arange(len(rows)).repeat_interleave(rows.shape[1]),
        rewards=rewards[flat],
    )


def dense_scores(logits, score):
    """Scores of all completions, in probabilities rather than logarithms."""
    if score == "log_likelihood":
        return sequence_logprobs(logits) / LENGTHS
    ratios = (token_logprobs(logits) - token_logprobs(OLD)).exp() * WORLD.mask
    return ratios.sum(dim=-1) / LENGTHS


@pytest.mark.parametrize("tau", [None, 0.7])
@pytest.mark.parametrize("score", ["log_likelihood", "ratio"])
def test_disco_has_the_gradient_of_its_expected_objective_over_all_groups(score, tau):
    logits = random_logits(0).requires_grad_()
    rows, probability = groups(3, among=12)
    term = Discriminative(score, tau)(batch_of(rows, logits, PASSED.double())).terms[0]
    found = (probability * term.losses * term.weights).sum()
    s, passed = dense_scores(logits, score)[rows], PASSED[rows]
    expected = torch.zeros((), dtype=torch.float64)
    for group, good, weight in zip(s, passed, probability, strict=True):
        if good.any() and not good.all():
            bad = group[~good]
            hard = bad.mean() if tau is None else tau * torch.log(torch.exp(bad / tau).mean())
            expected = expected + weight * (hard - group[good].mean())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    slopes = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (found, expected)]
    assert slopes[1].abs().max() > 1e-3
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-13)


def test_disco_with_a_large_tau_is_disco_b():
    rows, _ = groups(3, among=12)
    batch = batch_of(rows, random_logits(0), PASSED.double())
    basic, hard = DisCO(basic=True), DisCO(tau=1e6)  # they differ by the variance of scores over 2τ
    torch.testing.assert_close(hard(batch).mean(), basic(batch).mean(), rtol=1e-6, atol=1e-6)
    assert DisCO(score="ratio").objectives["disco"] == Discriminative("ratio", 1.0)
    with pytest.raises(ValueError, match="DisCO-b has no τ"):
        DisCO(basic=True, tau=1.0)


def divergence_of_old(name, logits, level):
    """``D_f(π_old‖π) = E_π[f(π_old/π)]`` of whole completions, or at each token of π_old's samples."""
    f = divergences.get(name).f
    if level == "sequence":
        log_u = sequence_logprobs(OLD) - sequence_logprobs(logits)
        return (sequence_logprobs(logits).exp() * f(log_u)).sum()
    policy, old = logits.log_softmax(-1), OLD.log_softmax(-1)
    at_prefix = (policy.exp() * f(old - policy)).sum(dim=-1)
    return (sequence_logprobs(OLD).exp() * (at_prefix[WORLD.prefix] * WORLD.mask).sum(dim=-1)).sum()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_of_the_trust_region_is_the_divergence_from_the_sampler(name, level):
    logits = random_logits(0, 0.5).requires_grad_()
    region = TrustRegion(divergences.get(name), level=level, reduction="sequence_sum")
    term = region.estimate(batch_of(torch.arange(N)[:, None], logits, PASSED.double()))
    found = (sequence_logprobs(OLD).exp() * term.losses).sum()
    expected = divergence_of_old(name, logits, level)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    slopes = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "pearson_chi2"])
def test_the_trust_region_has_the_gradient_of_the_squared_hinge_of_a_step(name):
    logits, beta, delta = random_logits(0, 0.5).requires_grad_(), 3.0, 0.05
    region = TrustRegion(divergences.get(name), beta, delta)
    batch = batch_of(torch.arange(N)[:, None], logits, PASSED.double())
    loss = region(batch).mean()
    u = ((token_logprobs(OLD) - token_logprobs(logits)) * WORLD.mask).exp()  # π_old/π at each sampled token
    f = {
        "reverse_kl": lambda v: v * v.log() - v + 1,
        "jensen_shannon": lambda v: v * v.log() - (v + 1) * ((v + 1) / 2).log(),
        "pearson_chi2": lambda v: (v - 1) ** 2,
    }[name]
    mean = (f(u) / u)[WORLD.mask].mean()
    assert mean > delta
    expected = beta * (mean - delta) ** 2
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    slopes = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-13)
    assert TrustRegion(divergences.get(name), beta, 100.0)(batch).mean() == 0
    same = batch_of(torch.arange(N)[:, None], OLD.clone(), PASSED.double())
    assert region(same).mean() == 0


def test_cloning_the_best_of_n_of_a_frozen_sampler_has_the_best_of_n_law_as_its_optimum():
    size, among = 2, N
    rewards = torch.tensor([float(sum(tokens) % 5) for tokens in COMPLETIONS]).double()  # with ties
    rows, probability = groups(size, among=among)
    law = sequence_logprobs(OLD).exp()
    # P(max ≤ r)ⁿ - P(max < r)ⁿ, shared among equally good completions by their probability.
    at_most = (law[None] * (rewards[None] <= rewards[:, None])).sum(-1)
    below = (law[None] * (rewards[None] < rewards[:, None])).sum(-1)
    best = law / (at_most - below) * (at_most**size - below**size)
    assert best.sum().item() == pytest.approx(1, abs=1e-12)
    logits = OLD.clone().requires_grad_()
    shares = BestOfN("sequence_sum").shares(batch_of(rows, OLD, rewards))
    weight = probability.repeat_interleave(size) * shares
    counts = torch.zeros(N, dtype=torch.float64).index_add(0, rows.flatten(), weight)
    torch.testing.assert_close(counts, best, rtol=1e-10, atol=1e-14)
    # The objective's own losses, weighted by the probability of their group.
    term = BestOfN("sequence_sum")(batch_of(rows, logits, rewards)).terms[0]
    expected = -(best * sequence_logprobs(logits)).sum()
    found = (probability.repeat_interleave(size) * term.losses * term.weights).sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        value = -(best * sequence_logprobs(logits)).sum()
        value.backward()
        return value

    optimizer.step(closure)
    reached = sequence_logprobs(logits.detach())
    on = best > 1e-12
    torch.testing.assert_close(reached.exp()[on], best[on], rtol=1e-4, atol=1e-6)


def test_the_halves_of_oreal_are_a_policy_gradient_on_policy():
    rows, _ = groups(3, among=8)
    rewards, logits = PASSED.double(), random_logits(0).requires_grad_()
    batch = batch_of(rows, logits, rewards)
    advantage = rewards[rows] - (rewards[rows].sum(-1, keepdim=True) - rewards[rows]) / 2
    loss = sum(
        (term.losses * term.weights).sum()
        for half in ("passed", "failed")
        for term in Cloning(half, advantage="leave_one_out", reduction="sequence_sum")(batch).terms
    )
    expected = -(advantage.flatten() * sequence_logprobs(logits)[rows.flatten()]).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_bad_settings_are_refused():
    kl = divergences.get("reverse_kl")
    for build, message in {
        lambda: Discriminative(tau=0.0): "tau=0.0 must be positive",
        lambda: Discriminative(pass_reward=math.inf): "pass_reward=inf must be finite",
        lambda: TrustRegion(kl, beta=0.0): "beta=0.0 must be positive",
        lambda: TrustRegion(kl, delta=-1.0): "delta=-1.0 must be finite and not negative",
        lambda: TrustRegion(kl, level="sequence", reduction="token_mean"): "is not a sum over tokens",
        lambda: Cloning(pass_reward=math.nan): "pass_reward=nan must be finite",
        lambda: Cloning(advantage="leave_one_in"): "leave_one_in",
    }.items():
        with pytest.raises(ValueError, match=message):
            build()


@pytest.mark.parametrize(
    "objective", [Cloning("best"), Cloning("passed"), Cloning("failed"), Discriminative(), Discriminative(tau=1.0)]
)
def test_a_reward_of_nan_is_neither_a_pass_nor_a_failure(objective):
    rewards = torch.zeros(N, dtype=torch.float64)
    rewards[:2] = torch.tensor([1.0, torch.nan])
    rows = torch.arange(6).view(2, 3)
    batch = batch_of(rows, random_logits(0, 0.5), rewards)
    assert objective(batch).mean().isnan()
    assert objective(replace(batch, rewards=batch.rewards.nan_to_num())).mean().isfinite()
