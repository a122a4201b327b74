"""The frontier of an enumerated world: four completions, whose probabilities are those of 20 samples."""

import math

import pytest
import torch

from falign import divergences
from falign.evaluation.frontier import best_of_n_frontier, betas, ideal_frontier, sample_limit

COUNTS = torch.tensor([10, 5, 4, 1])
REFERENCE = COUNTS.double() / 20
REWARDS = torch.tensor([[0.0, 1.0, 0.5, 2.0], [1.0, -1.0, 0.3, 0.2]], dtype=torch.float64)  # of two prompts
SAMPLES = REWARDS.repeat_interleave(COUNTS, dim=1)
NAMES = ["reverse_kl", "forward_kl", "jensen_shannon", "pearson_chi2", "total_variation", "alpha(0.5)", "jeffreys"]


def exact(divergence, policies):
    """Mean over prompts of ``Σ π_ref f(π/π_ref)``, term by term."""
    return (REFERENCE * divergence.f((policies / REFERENCE).log())).sum(dim=1).mean().item()


@pytest.mark.parametrize("beta", [0.05, 0.3, 4.0])
def test_the_ideal_of_the_reverse_kl_is_the_exponential_tilt(beta):
    tilt = REFERENCE * torch.exp(REWARDS / beta)
    tilt = tilt / tilt.sum(dim=1, keepdim=True)
    point = ideal_frontier(SAMPLES, divergences.get("reverse_kl"), [beta])[0]
    assert point.reward == pytest.approx((tilt * REWARDS).sum(dim=1).mean().item(), rel=1e-10)
    assert point.divergence == pytest.approx((tilt * (tilt / REFERENCE).log()).sum(dim=1).mean().item(), rel=1e-9)
    assert point.own == point.divergence
    # On another axis it is the same policy.
    jensen = divergences.get("jensen_shannon")
    other = ideal_frontier(SAMPLES, divergences.get("reverse_kl"), [beta], axis=jensen)[0]
    assert (other.reward, other.own) == (point.reward, point.own)
    assert other.divergence == pytest.approx(exact(jensen, tilt), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_reward_and_divergence_rise_together_from_the_reference_to_the_limit(name):
    divergence = divergences.get(name)
    points = ideal_frontier(SAMPLES, divergence, betas(SAMPLES, divergence))
    rewards, distances = torch.tensor([(p.reward, p.divergence) for p in points], dtype=torch.float64).T
    assert (rewards.diff() >= -1e-9).all()
    assert (distances.diff() >= -1e-9).all()
    spread = SAMPLES.var(dim=1, correction=0).mean().sqrt().item()
    assert rewards[0].item() == pytest.approx(SAMPLES.mean().item(), abs=0.1 * spread)
    limit = sample_limit(SAMPLES, divergence)
    assert limit.reward == 1.5
    assert rewards[-1].item() <= limit.reward + 1e-9
    if name in ("reverse_kl", "jensen_shannon", "pearson_chi2", "total_variation"):
        assert rewards[-1].item() == pytest.approx(limit.reward, abs=1e-3)
        assert distances[-1].item() == pytest.approx(limit.divergence, abs=1e-3 * limit.divergence)


def test_the_limit_is_the_logarithm_of_the_samples_that_share_the_best():
    limit = sample_limit(SAMPLES, divergences.get("reverse_kl"))
    assert (limit.num_samples, limit.divergence) == (20, pytest.approx((math.log(20) + math.log(2)) / 2, rel=1e-12))
    assert sample_limit(SAMPLES, divergences.get("forward_kl")).divergence == math.inf


@pytest.mark.parametrize("name", NAMES)
def test_no_policy_lies_above_the_frontier_of_its_own_divergence(name):
    divergence = divergences.get(name)
    ideal = ideal_frontier(SAMPLES, divergence, betas(SAMPLES, divergence))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 2, 4, generator=generator, dtype=torch.float64)
    tilts = REFERENCE.log() + REWARDS / torch.linspace(0.1, 3, 40, dtype=torch.float64)[:, None, None]
    nearest = math.inf
    for policy in torch.cat([logits, tilts]).softmax(dim=-1):
        reward, distance = (policy * REWARDS).sum(dim=1).mean().item(), exact(divergence, policy)
        # The frontier lies above each of its tangents' lower side: no β has a better policy than its own.
        room = [p.reward - p.beta * p.own - (reward - p.beta * distance) for p in ideal]
        assert min(room) > -1e-8
        nearest = min(nearest, *room)
    if name == "reverse_kl":
        assert nearest < 1e-3  # tilts lie on it


def test_the_best_of_n_keeps_below_the_ideal_of_every_divergence_at_the_true_distance():
    """Enumerated: the law of the best of n of these 20 draws with replacement, ties broken evenly."""
    divergence = divergences.get("jensen_shannon")
    ideal = ideal_frontier(SAMPLES, divergence, betas(SAMPLES, divergence))
    for n in (2, 4):
        order = REWARDS.argsort(dim=1)
        cumulative = REFERENCE[order].cumsum(dim=1) ** n
        law = torch.cat([cumulative[:, :1], cumulative.diff(dim=1)], dim=1)
        best = torch.zeros_like(law).scatter(1, order, law)
        reward, distance = (best * REWARDS).sum(dim=1).mean().item(), exact(divergence, best)
        assert min(p.reward - p.beta * p.own - (reward - p.beta * distance) for p in ideal) > -1e-9


def test_best_of_n_has_the_unbiased_reward_and_the_bound_on_its_divergence():
    points = best_of_n_frontier(SAMPLES, divergences.get("reverse_kl"))
    assert [point.n for point in points] == [1, 2, 4, 8, 16, 20]
    assert points[0] == (1, 0.0, pytest.approx(SAMPLES.mean().item()))
    assert points[-1].reward == 1.5
    pairs = torch.tensor([[max(a, b) for i, a in enumerate(row) for b in row[:i]] for row in SAMPLES.tolist()])
    assert points[1].reward == pytest.approx(pairs.mean().item(), rel=1e-6)
    for point in points[1:]:
        assert point.divergence == pytest.approx(math.log(point.n) - (point.n - 1) / point.n, rel=1e-9)


def test_few_samples_say_too_little_of_what_can_be_reached_and_never_too_much_on_average():
    divergence, beta = divergences.get("reverse_kl"), 0.3
    true = ideal_frontier(SAMPLES[:1], divergence, [beta])[0]
    generator = torch.Generator().manual_seed(1)
    found = []
    for size in (4, 32):
        draws = torch.multinomial(REFERENCE, 4000 * size, replacement=True, generator=generator).view(4000, size)
        point = ideal_frontier(REWARDS[0][draws], divergence, [beta])[0]
        found.append(point.reward - beta * point.divergence)
    assert found[0] + 0.05 < found[1] < true.reward - beta * true.divergence


def test_a_policy_that_gives_completions_up_is_infinitely_far_under_the_forward_kl():
    given_up = ideal_frontier(SAMPLES, divergences.get("pearson_chi2"), [0.05], axis=divergences.get("forward_kl"))
    assert given_up[0].divergence == math.inf
    assert given_up[0].own < 40


def test_without_differences_in_reward_the_frontier_is_the_reference():
    same = torch.ones(2, 6)
    divergence = divergences.get("reverse_kl")
    for point in ideal_frontier(same, divergence, betas(same, divergence)):
        assert (point.divergence, point.reward) == (pytest.approx(0.0, abs=1e-12), pytest.approx(1.0))
