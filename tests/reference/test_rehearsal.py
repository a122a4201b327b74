"""Rehearsal's mean over the reference's samples is the divergence in value and gradient; a hybrid is the sum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from falign import CompletionBatch, divergences
from falign.objectives import Hybrid, PolicyGradient, Rehearsal
from tests.reference.test_estimators import (
    NAMES,
    OLD,
    REFERENCE,
    gradient,
    textbook_sequence_divergence,
    textbook_token_divergence,
)
from tests.reference.world import COMPLETIONS, WORLD, random_logits, sequence_logprobs, token_logprobs

N = len(COMPLETIONS)
REWARDS = torch.randn(N, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@pytest.fixture(params=NAMES)
def divergence(request):
    return divergences.get(request.param)


@pytest.fixture
def logits() -> Tensor:
    return random_logits(0).requires_grad_()


def everything(logits: Tensor) -> CompletionBatch:
    return CompletionBatch(
        logprobs=token_logprobs(logits),
        reference_logprobs=token_logprobs(REFERENCE),
        completion_mask=WORLD.mask,
        prompt_index=torch.arange(N),
    )


def exact_rehearsal(divergence, logits: Tensor, level: str) -> Tensor:
    if level == "sequence":
        return textbook_sequence_divergence(divergence, logits)
    return textbook_token_divergence(divergence, logits, REFERENCE)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_mean_over_reference_samples_is_the_divergence_and_its_gradient(divergence, logits, level):
    output = Rehearsal(divergence, level, "sequence_sum")(everything(logits))
    drawn = sequence_logprobs(REFERENCE).exp()
    mean, exact = (drawn * output.terms[0].losses).sum(), exact_rehearsal(divergence, logits, level)
    torch.testing.assert_close(mean, exact, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits), rtol=0, atol=1e-8)
    torch.testing.assert_close((drawn * output.metrics[f"divergence/{divergence.name}"]).sum(), exact.detach())


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_a_hybrid_has_the_gradient_of_the_sum(divergence, logits, level, off_policy):
    """All completions twice: as samples of the policy (or an older one), and as samples of the reference."""
    coefficient, beta = 0.4, 0.2
    hybrid = Hybrid(PolicyGradient(divergence, beta, "none"), Rehearsal(divergence, level, "sequence_sum"), coefficient)
    old = OLD if off_policy else logits.detach()
    twice = lambda x: torch.cat([x, x])  # noqa: E731
    batch = CompletionBatch(
        logprobs=twice(token_logprobs(logits)),
        reference_logprobs=twice(token_logprobs(REFERENCE)),
        old_logprobs=torch.cat([token_logprobs(old), torch.full_like(token_logprobs(old), math.nan)]),
        completion_mask=twice(WORLD.mask),
        prompt_index=torch.arange(2 * N),
        rewards=torch.cat([REWARDS, torch.full_like(REWARDS, math.nan)]),
        from_reference=torch.arange(2 * N) >= N,
    )
    explored, kept = hybrid(batch).terms
    assert kept.scale == coefficient
    mean = (sequence_logprobs(old).exp() * explored.losses).sum()
    mean = mean + kept.scale * (sequence_logprobs(REFERENCE).exp() * kept.losses).sum()
    exact = -(sequence_logprobs(logits).exp() * REWARDS).sum()
    exact = exact + beta * textbook_sequence_divergence(divergence, logits)
    exact = exact + coefficient * exact_rehearsal(divergence, logits, level)
    torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits), rtol=0, atol=1e-8)


# methods.md, B.3: the losses per token of DPH-RL's generator forms, of l = log π - log π_ref.
PAPER = {
    "forward_kl": lambda x: torch.exp(x) - x - 1,  # k3 with the roles swapped
    "jensen_shannon": lambda x: torch.exp(x) * x - (torch.exp(x) + 1) * torch.log((torch.exp(x) + 1) / 2),
    "alpha(0.2)": lambda x: (torch.exp(x) ** 0.8 - 0.8 * torch.exp(x) - 0.2) / (0.2 * (0.2 - 1)),
}


@pytest.mark.parametrize("name", PAPER)
def test_losses_and_gradients_per_token_are_dph_rls(name, logits):
    batch = everything(logits)
    log_u = torch.where(WORLD.mask, batch.logprobs - batch.reference_logprobs, 0.0)
    expected = (PAPER[name](log_u) * WORLD.mask).sum() / WORLD.mask.sum()
    loss = Rehearsal(divergences.get(name))(batch).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


@pytest.mark.parametrize("name", PAPER)
def test_a_token_that_the_policy_has_dropped_is_repaired(name):
    """Where the published code has NaN (0 · log 0) or a clamp without gradient."""
    for dropped in (-11.0, -104.0, -200.0, -1e4):
        logprobs = torch.tensor([[dropped - 1.0, -1.0]], requires_grad=True)
        batch = CompletionBatch(
            logprobs=logprobs,
            reference_logprobs=torch.full((1, 2), -1.0),
            completion_mask=torch.ones(1, 2, dtype=torch.bool),
            prompt_index=torch.tensor([0]),
        )
        loss = Rehearsal(divergences.get(name))(batch).mean()
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logprobs.grad).all()
        if name == "forward_kl":
            assert logprobs.grad[0, 0].item() == pytest.approx(-0.5, abs=1e-4)  # (u - 1)/2, whatever was dropped
