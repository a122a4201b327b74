"""The policy gradient's mean over everything that can be sampled is the gradient of ``E[r] - β D_f``, by enumeration.

Groups of two completions are enumerated as pairs, so that advantages within a group take part in the mean.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from falign import CompletionBatch, divergences
from falign.divergences.estimators import full_vocabulary
from falign.objectives import PolicyGradient
from tests.reference.test_estimators import (
    NAMES,
    OLD,
    REFERENCE,
    gradient,
    textbook_sequence_divergence,
    textbook_token_divergence,
)
from tests.reference.world import COMPLETIONS, PREFIXES, WORLD, random_logits, sequence_logprobs, token_logprobs

BETA, N = 0.3, len(COMPLETIONS)
REWARDS = torch.randn(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
FIRST, SECOND = torch.cartesian_prod(torch.arange(N), torch.arange(N)).unbind(-1)
ROWS = torch.stack([FIRST, SECOND], dim=-1).flatten()  # the two of each pair stand side by side
PAIR = torch.arange(N * N).repeat_interleave(2)
LEVELS = [
    ("sequence", "fixed_prefix"),
    ("token", "fixed_prefix"),
    ("token", "returns"),
    ("vocabulary", "fixed_prefix"),
    ("vocabulary", "returns"),
]


@pytest.fixture(params=NAMES)
def divergence(request):
    return divergences.get(request.param)


@pytest.fixture
def logits() -> Tensor:
    return random_logits(0).requires_grad_()


def pairs(logits: Tensor, objective: PolicyGradient, old: Tensor | None) -> CompletionBatch:
    """Every ordered pair of completions of one prompt; old_logprobs are left out where they are the policy's."""
    measures = {}
    if objective.measures:
        at_prefix = full_vocabulary(objective.divergence, logits.log_softmax(-1), REFERENCE.log_softmax(-1))
        measures = {"divergence": at_prefix[WORLD.prefix][ROWS]}
    return CompletionBatch(
        logprobs=token_logprobs(logits)[ROWS],
        reference_logprobs=token_logprobs(REFERENCE)[ROWS],
        old_logprobs=None if old is None else token_logprobs(old)[ROWS],
        measures=measures,
        completion_mask=WORLD.mask[ROWS],
        prompt_index=PAIR,
        rewards=REWARDS[ROWS],
    )


def mean_loss(objective: PolicyGradient, batch: CompletionBatch, law: Tensor) -> Tensor:
    """Of the pairs, by how often π_old draws them, and of the two in a pair."""
    drawn = (law[FIRST] + law[SECOND]).exp().repeat_interleave(2) / 2
    (term,) = objective(batch).terms
    assert (term.weights == 1).all()
    return (drawn * term.losses).sum()


def negative_reward(logits: Tensor) -> Tensor:
    return -(sequence_logprobs(logits).exp() * REWARDS).sum()


def textbook_penalty(divergence, logits: Tensor, level: str, credit: str) -> Tensor:
    if level == "sequence":
        return textbook_sequence_divergence(divergence, logits)
    return textbook_token_divergence(divergence, logits, logits if credit == "returns" else logits.detach())


@pytest.mark.parametrize(("level", "credit"), LEVELS)
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_the_mean_gradient_is_that_of_reward_minus_divergence(divergence, logits, level, credit, off_policy, prepared):
    objective = PolicyGradient(divergence, BETA, level=level, credit=credit)
    old = OLD if off_policy else logits.detach()
    batch = pairs(logits, objective, OLD if off_policy else None)
    if prepared:  # from the whole rollout, before its first update
        before = objective.prepare(pairs(old, objective, None))
        batch = dataclasses.replace(batch, advantages=before.advantages, baseline=before.baseline)
    mean = mean_loss(objective, batch, sequence_logprobs(old))
    exact = negative_reward(logits) + BETA * textbook_penalty(divergence, logits, level, credit)
    torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits), rtol=0, atol=1e-8)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize(("advantage", "factor"), [("none", 1.0), ("leave_one_out", 1.0), ("group_centred", 0.5)])
def test_advantages_are_exact_up_to_the_factor_that_they_name(logits, advantage, factor, off_policy):
    objective = PolicyGradient(advantage=advantage)
    batch = pairs(logits, objective, OLD if off_policy else None)
    mean = mean_loss(objective, batch, sequence_logprobs(OLD if off_policy else logits.detach()))
    expected = factor * gradient(negative_reward(logits), logits)
    torch.testing.assert_close(gradient(mean, logits), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("off_policy", [False, True])
def test_reinforce_with_a_penalty_is_exact_without_any_baseline(divergence, logits, off_policy):
    objective = PolicyGradient(divergence, BETA, advantage="none")
    batch = pairs(logits, objective, OLD if off_policy else None)
    assert objective.prepare(batch).baseline is None
    mean = mean_loss(objective, batch, sequence_logprobs(OLD if off_policy else logits.detach()))
    exact = negative_reward(logits) + BETA * textbook_sequence_divergence(divergence, logits)
    torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits), rtol=0, atol=1e-8)


def test_token_importance_is_exact_on_policy_and_not_off_policy(logits):
    objective = PolicyGradient(importance="token")
    exact = gradient(negative_reward(logits), logits)
    on_policy = mean_loss(objective, pairs(logits, objective, logits.detach()), sequence_logprobs(logits.detach()))
    torch.testing.assert_close(gradient(on_policy, logits), exact, rtol=0, atol=1e-8)
    off_policy = mean_loss(objective, pairs(logits, objective, OLD), sequence_logprobs(OLD))
    assert (gradient(off_policy, logits) - exact).abs().max() > 1e-3


@pytest.mark.parametrize("off_policy", [False, True])
def test_values_of_prefixes_are_a_baseline_that_changes_no_mean(divergence, logits, off_policy):
    """GAE with γ = λ = 1 is ``r - V(s_t)``, whatever V is."""
    objective = PolicyGradient(divergence, BETA, advantage="gae", gamma=1.0, lam=1.0)
    values = torch.randn(len(PREFIXES), generator=torch.Generator().manual_seed(8), dtype=torch.float64)[WORLD.prefix]
    batch = dataclasses.replace(
        pairs(logits, objective, OLD if off_policy else None), values=values[ROWS], old_values=values[ROWS]
    )
    drawn = sequence_logprobs(OLD if off_policy else logits.detach())
    term, of_values = objective(batch).terms
    mean = ((drawn[FIRST] + drawn[SECOND]).exp().repeat_interleave(2) / 2 * term.losses).sum()
    exact = negative_reward(logits) + BETA * textbook_sequence_divergence(divergence, logits)
    torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits), rtol=0, atol=1e-8)
    error = ((REWARDS[:, None] - values) ** 2 / 2).masked_fill(~WORLD.mask, 0.0)[ROWS]
    assert of_values.scale == 0.1
    torch.testing.assert_close(
        (of_values.losses * of_values.weights).sum() / of_values.weights.sum(), error.sum() / WORLD.mask[ROWS].sum()
    )


@pytest.mark.parametrize(("level", "credit"), LEVELS)
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_logged_divergence_is_the_one_that_is_penalised(divergence, logits, level, credit, off_policy):
    objective = PolicyGradient(divergence, BETA, level=level, credit=credit)
    batch = pairs(logits, objective, OLD if off_policy else None)
    law = sequence_logprobs(OLD if off_policy else logits.detach())
    drawn = (law[FIRST] + law[SECOND]).exp().repeat_interleave(2) / 2
    logged = (drawn * objective(batch).metrics[f"divergence/{divergence.name}"]).sum()
    torch.testing.assert_close(logged, textbook_penalty(divergence, logits, level, credit).detach())


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_grpo_and_dapo_are_the_papers_formulas_token_by_token(reduction):
    """With clips, several updates after sampling and ragged lengths; no penalty, which the papers' is not."""
    generator = torch.Generator().manual_seed(5)
    rows, group = torch.randint(N, (12,), generator=generator), torch.arange(12) // 4
    logits = random_logits(0).requires_grad_()
    objective = PolicyGradient(
        advantage="group_normalised", clip_low=0.2, clip_high=0.28, importance="token", reduction=reduction
    )
    batch = CompletionBatch(
        logprobs=token_logprobs(logits)[rows],
        old_logprobs=token_logprobs(OLD)[rows],
        completion_mask=WORLD.mask[rows],
        prompt_index=group,
        rewards=REWARDS[rows],
    )
    expected, count = torch.zeros((), dtype=torch.float64), 0
    for i, row in enumerate(rows.tolist()):
        own = REWARDS[rows][group == group[i]]
        advantage = (REWARDS[row] - own.mean()) / (own.std() + 1e-4)
        tokens = COMPLETIONS[row]
        total = torch.zeros((), dtype=torch.float64)
        for t in range(len(tokens)):
            ratio = (batch.logprobs[i, t] - batch.old_logprobs[i, t]).exp()
            clipped = ratio.clamp(0.8, 1.28)
            total = total + torch.minimum(ratio * advantage, clipped * advantage)
        expected = expected - (total / len(tokens) / 12 if reduction == "sequence_mean" else total)
        count += len(tokens)
    expected = expected if reduction == "sequence_mean" else expected / count
    loss = objective(batch).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))
    assert 0 < objective(batch).metrics["clip_ratio/low"].mean() < 1
