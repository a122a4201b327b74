"""H-DPO: the closed form, its optimum, α = 1, and the divergences that admit α < 1."""

import math

import pytest
import torch

from falign import divergences
from falign.methods import FDPO, HDPO
from falign.objectives import CompletionBatch, complete
from tests.reference.world import WORLD, random_logits, sequence_logprobs, token_logprobs

REWARDS = torch.randn(len(WORLD.tokens), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
REFERENCE = random_logits(1)


def world_batch(logits):
    return CompletionBatch(
        logprobs=token_logprobs(logits),
        reference_logprobs=token_logprobs(REFERENCE),
        completion_mask=WORLD.mask,
        prompt_index=torch.zeros(len(REWARDS), dtype=torch.long),
        preference=REWARDS,
    )


def test_value_and_gradient_are_those_of_the_closed_form():
    logits, beta, alpha = random_logits(0).requires_grad_(), 0.4, 0.7
    loss = HDPO(beta=beta, alpha=alpha)(world_batch(logits)).mean()
    score = beta * (alpha * sequence_logprobs(logits) - sequence_logprobs(REFERENCE))
    margin = score[:, None] - score[None]
    expected = torch.log1p(torch.exp(-margin))[REWARDS[:, None] > REWARDS[None]].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_at_the_published_optimum_the_implicit_reward_is_the_reward():
    """π ∝ (π_ref e^{r/β})^{1/α}, as one distribution over whole completions."""
    beta, alpha = 0.6, 0.8
    reference = sequence_logprobs(REFERENCE)
    optimum = ((reference + REWARDS / beta) / alpha).log_softmax(-1)
    batch = CompletionBatch(
        logprobs=optimum[:, None],
        reference_logprobs=reference[:, None],
        completion_mask=torch.ones(len(REWARDS), 1, dtype=torch.bool),
        prompt_index=torch.zeros(len(REWARDS), dtype=torch.long),
    )
    found = HDPO(beta=beta, alpha=alpha).completion_rewards(batch)
    torch.testing.assert_close(found - found.mean(), REWARDS - REWARDS.mean(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon"])
def test_with_alpha_one_it_is_f_dpo_bit_for_bit(name):
    batch = world_batch(random_logits(0))
    ours, plain = HDPO(name, 0.3, alpha=1.0)(batch), FDPO(name, 0.3)(batch)
    assert torch.equal(ours.terms[0].losses, plain.terms[0].losses)
    assert all(torch.equal(ours.metrics[key], plain.metrics[key]) for key in plain.metrics)
    assert HDPO(name, 0.3, alpha=1.0).link is not None
    assert HDPO(name, 0.3, alpha=1.2).link is None
    assert complete(HDPO(name, 0.3, alpha=1.2)).rewarding


ADMITTED = {"reverse_kl", "jeffreys", "chi2_kl"}


@pytest.mark.parametrize("name", [n for n in divergences.names() if n not in ("alpha", "generalized_js")])
def test_a_sharper_policy_needs_a_reward_that_increases_with_its_probability(name):
    divergence = divergences.get(name)
    if not divergence.has_barrier:
        return
    if name in ADMITTED:
        assert HDPO(name, 0.1, alpha=0.5).entropy_weight == 0.5
    else:
        with pytest.raises(ValueError, match="does not increase with π"):
            HDPO(name, 0.1, alpha=0.5)
    assert HDPO(name, 0.1, alpha=1.5).entropy_weight == 1.5


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf])
def test_an_alpha_that_is_not_positive_is_refused(alpha):
    with pytest.raises(ValueError, match=r"^alpha=.* must be positive and finite"):
        HDPO(alpha=alpha)
