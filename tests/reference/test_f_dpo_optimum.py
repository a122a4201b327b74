"""f-DPO's promise: the population minimizer is ``π_ref(y) (f')⁻¹((r(y) - λ)/β)``.

Under Bradley-Terry labels for pairs, under Plackett-Luce rankings for lists.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from falign import FDPO, CompletionBatch, divergences
from falign.objectives import Listwise, pairs_of
from tests.reference.world import COMPLETIONS, WORLD, random_logits, sequence_logprobs, token_logprobs

# torch.func imports a module of torch that still uses torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

BARRED = [
    *("reverse_kl", "forward_kl", "jensen_shannon", "jeffreys", "squared_hellinger", "neyman_chi2", "chi2_kl"),
    *("alpha(0.3)", "alpha(0.7)", "alpha(1.4)", "generalized_js(0.3)", "dual(chi2_kl)", "standardized(jensen_shannon)"),
]
BETA = 0.4
N = len(COMPLETIONS)
REFERENCE = random_logits(5, scale=0.7)


def rewards() -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return 0.15 * torch.randn(N, generator=generator, dtype=torch.float64)


def optimum(divergence, reward: Tensor) -> Tensor:
    """log π* by bisection on λ, from the inverse of f' alone."""
    log_ref = sequence_logprobs(REFERENCE)

    def mass(multiplier: float) -> float:
        return (log_ref + divergence.f_prime_inverse((reward - multiplier) / BETA)).exp().sum().item()

    low, high = reward.min().item() - 20.0, reward.max().item() + 20.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) > 1 else (low, middle)
    return log_ref + divergence.f_prime_inverse((reward - high) / BETA)


def population_loss(objective, logits: Tensor, reward: Tensor) -> Tensor:
    """All ordered pairs, weighted by how often they are drawn and labeled so."""
    log_ref, total = sequence_logprobs(REFERENCE), torch.zeros((), dtype=torch.float64)
    for order in (torch.arange(N, dtype=torch.float64), -torch.arange(N, dtype=torch.float64)):
        batch = CompletionBatch(
            logprobs=token_logprobs(logits),
            reference_logprobs=token_logprobs(REFERENCE),
            completion_mask=WORLD.mask,
            prompt_index=torch.zeros(N, dtype=torch.long),
            preference=order,
        )
        chosen, rejected = pairs_of(order, batch.prompt_index)
        drawn = (log_ref[chosen] + log_ref[rejected]).exp()
        wins = torch.sigmoid(reward[chosen] - reward[rejected])
        total = total + (drawn * wins * objective(batch).terms[0].losses).sum()
    return total


@pytest.mark.parametrize("name", BARRED)
def test_minimising_the_population_loss_recovers_the_optimum(name):
    divergence = divergences.get(name)
    objective, reward = FDPO(divergence, beta=BETA), rewards()
    expected = optimum(divergence, reward)
    assert expected.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    assert (expected - sequence_logprobs(REFERENCE)).abs().max() > 0.2  # the optimum is a different policy
    logits = minimize(lambda x: population_loss(objective, x, reward), REFERENCE.clone())
    torch.testing.assert_close(sequence_logprobs(logits), expected, rtol=0, atol=1e-7)


def population_loss_of_lists(objective, logits: Tensor, reward: Tensor) -> Tensor:
    """Lists of three neighbors, which connect all completions, weighted by the Plackett-Luce law of their rankings."""
    total = torch.zeros((), dtype=torch.float64)
    for order in itertools.permutations(range(3)):
        ranked = (torch.arange(N)[:, None] + torch.tensor(order)) % N  # best first, shape (lists, 3)
        rows = ranked.flatten()
        batch = CompletionBatch(
            logprobs=token_logprobs(logits)[rows],
            reference_logprobs=token_logprobs(REFERENCE)[rows],
            completion_mask=WORLD.mask[rows],
            prompt_index=torch.arange(N).repeat_interleave(3),
            preference=torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64).repeat(N),
        )
        strengths = reward[ranked].exp()
        first, second = strengths[:, 0] / strengths.sum(-1), strengths[:, 1] / strengths[:, 1:].sum(-1)
        total = total + (first * second * objective(batch).terms[0].losses).sum()
    return total


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "chi2_kl"])
def test_minimising_the_population_loss_of_ranked_lists_recovers_the_optimum(name):
    divergence = divergences.get(name)
    objective, reward = Listwise(divergence, beta=BETA), rewards()
    logits = minimize(lambda x: population_loss_of_lists(objective, x, reward), REFERENCE.clone())
    torch.testing.assert_close(sequence_logprobs(logits), optimum(divergence, reward), rtol=0, atol=1e-7)


def minimize(loss, start: Tensor) -> Tensor:
    """Newton's method; logits have one free constant per prefix, hence the pseudo-inverse."""
    x = start.flatten()
    flat = lambda v: loss(v.view_as(start))  # noqa: E731
    for _ in range(60):
        slope, curvature = torch.func.grad(flat)(x), torch.func.hessian(flat)(x)
        values, vectors = torch.linalg.eigh(curvature)
        inverse = torch.where(values.abs() > 1e-9, 1 / values.abs(), torch.zeros_like(values))
        step = vectors @ (inverse * (vectors.T @ slope))
        size = 1.0
        while flat(x - size * step) > flat(x) and size > 1e-6:
            size /= 2
        x = x - size * step
        if step.abs().max() < 1e-7:
            break
    return x.view_as(start)


@pytest.mark.parametrize("name", BARRED)
def test_the_optimum_maximises_reward_minus_divergence(name):
    """An independent look at π*: its objective beats that of every perturbed policy."""
    divergence, reward = divergences.get(name), rewards()
    log_ref, best = sequence_logprobs(REFERENCE), optimum(divergences.get(name), rewards())

    def value(log_p: Tensor) -> Tensor:
        return (log_p.exp() * reward).sum() - BETA * (log_ref.exp() * divergence.f(log_p - log_ref)).sum()

    generator = torch.Generator().manual_seed(2)
    for scale in (0.3, 0.03):
        for _ in range(20):
            other = (best + scale * torch.randn(N, generator=generator, dtype=torch.float64)).log_softmax(-1)
            assert value(other) < value(best)
