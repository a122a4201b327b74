"""Distillation's mean over everything that can be sampled is the gradient of the divergence to the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from falign import CompletionBatch, divergences
from falign.divergences.estimators import full_vocabulary
from falign.objectives import Distillation, DivergenceTo, Entropy, Measure, PolicyGradient, Rehearsal, Sum, Vocabulary
from tests.reference.test_estimators import (
    OLD,
    REFERENCE,
    divergence_at_prefixes,
    gradient,
    textbook_sequence_divergence,
    textbook_token_divergence,
)
from tests.reference.test_online_optimum import SMOOTH
from tests.reference.test_policy_gradient import BETA, LEVELS, REWARDS, negative_reward
from tests.reference.world import WORLD, random_logits, sequence_logprobs, token_logprobs

NAMES = [*SMOOTH, "total_variation"]
N = len(WORLD.tokens)
TEACHER = REFERENCE  # the oracles of tests/reference/test_estimators.py measure to these logits


@pytest.fixture(params=NAMES)
def divergence(request):
    return divergences.get(request.param)


@pytest.fixture
def logits() -> Tensor:
    return random_logits(0).requires_grad_()


def batch_of(objective, logits: Tensor, old: Tensor | None = None, **given) -> CompletionBatch:
    """Every completion once, with the measures of a visit to the whole vocabulary."""
    log_pi = logits.log_softmax(-1)
    at = Vocabulary(log_pi, torch.zeros(len(log_pi), dtype=torch.long), {"teacher": TEACHER.log_softmax(-1)})
    return CompletionBatch(
        logprobs=token_logprobs(logits),
        references={"teacher": token_logprobs(TEACHER)},
        old_logprobs=None if old is None else token_logprobs(old),
        measures={name: measure(at)[WORLD.prefix] for name, measure in objective.measures.items()},
        completion_mask=WORLD.mask,
        prompt_index=torch.arange(N),
        **given,
    )


def textbook(divergence, logits: Tensor, level: str, credit: str) -> Tensor:
    if level == "sequence":
        return textbook_sequence_divergence(divergence, logits)
    return textbook_token_divergence(divergence, logits, logits if credit == "returns" else logits.detach())


@pytest.mark.parametrize(("level", "credit"), LEVELS)
@pytest.mark.parametrize("off_policy", [False, True])
def test_on_samples_the_mean_gradient_is_that_of_the_divergence_to_the_teacher(
    divergence, logits, level, credit, off_policy
):
    objective = Distillation(divergence, level=level, credit=credit, reduction="sequence_sum")
    drawn = sequence_logprobs(OLD if off_policy else logits.detach()).exp()
    output = objective(batch_of(objective, logits, OLD if off_policy else None))
    exact = textbook(divergence, logits, level, credit)
    mean = (drawn * output.terms[0].losses).sum()
    torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits), rtol=0, atol=1e-8)
    logged = (drawn * output.metrics[f"divergence/{divergence.name}"]).sum()
    torch.testing.assert_close(logged, exact.detach())


def test_given_completions_are_a_mean_over_their_tokens_of_the_exact_divergence(divergence, logits):
    objective = Distillation(divergence)
    loss = objective(batch_of(objective, logits)).mean()
    exact = divergence_at_prefixes(divergence, logits)[WORLD.prefix][WORLD.mask].mean()
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(gradient(loss, logits), gradient(exact, logits))
    # The completions' own probabilities play no part: only their prefixes do.
    assert objective.needs == frozenset()


def test_a_temperature_softens_both_distributions(logits):
    objective = Distillation(divergences.get("forward_kl"), temperature=2.0)
    softened = full_vocabulary(
        divergences.get("forward_kl"), (logits / 2).log_softmax(-1), (TEACHER / 2).log_softmax(-1)
    )
    torch.testing.assert_close(objective(batch_of(objective, logits)).mean(), softened[WORLD.prefix][WORLD.mask].mean())


def test_samples_of_the_teacher_need_only_its_log_probabilities(divergence, logits):
    objective = Rehearsal(divergence, "sequence", reference="teacher")
    losses = objective(batch_of(objective, logits)).terms[0].losses
    mean = (sequence_logprobs(TEACHER).exp() * losses).sum()
    exact = textbook_sequence_divergence(divergence, logits)
    torch.testing.assert_close(mean, exact)
    torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits), rtol=0, atol=1e-8)


@pytest.mark.parametrize("level", ["token", "vocabulary"])
def test_token_importance_is_exact_on_samples_of_the_policy_itself(divergence, logits, level):
    objective = Distillation(divergence, level=level, importance="token", reduction="sequence_sum")
    drawn, exact = sequence_logprobs(logits.detach()).exp(), textbook(divergence, logits, level, "fixed_prefix")
    mean = (drawn * objective(batch_of(objective, logits, logits.detach())).terms[0].losses).sum()
    torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits), rtol=0, atol=1e-8)
    # On samples of π_old it is the divergence on π_old's prefixes: each token is weighted, and its prefix is not.
    mean = (sequence_logprobs(OLD).exp() * objective(batch_of(objective, logits, OLD)).terms[0].losses).sum()
    elsewhere = textbook_token_divergence(divergence, logits, OLD)
    torch.testing.assert_close(gradient(mean, logits), gradient(elsewhere, logits), rtol=0, atol=1e-8)


def test_a_measure_takes_the_place_of_f(logits):
    named = Distillation(divergences.get("jensen_shannon"), reduction="sequence_sum")
    measured = Distillation(DivergenceTo(divergences.get("jensen_shannon"), "teacher"), reduction="sequence_sum")
    losses = [objective(batch_of(objective, logits)).terms[0].losses for objective in (named, measured)]
    assert torch.equal(*losses)
    entropy = Distillation(Entropy(), reduction="sequence_sum")
    expected = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)[WORLD.prefix].masked_fill(~WORLD.mask, 0.0)
    torch.testing.assert_close(entropy(batch_of(entropy, logits)).metrics["measure"], expected.sum(-1).detach())


@dataclass(frozen=True)
class ByPrefix:
    """A factor that depends on the prefix alone, 0 at some."""

    factors: Tensor
    needs: ClassVar[frozenset[str]] = frozenset()
    measures: ClassVar[dict[str, Measure]] = {}

    def __call__(self, batch: CompletionBatch) -> Tensor:
        return self.factors[WORLD.prefix]


@pytest.mark.parametrize("level", ["token", "vocabulary"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_weights_are_factors_of_the_divergence_at_each_prefix(divergence, logits, level, off_policy):
    factors = (torch.arange(len(logits)) % 3).double()
    objective = Distillation(divergence, level=level, weights=[ByPrefix(factors)], reduction="sequence_sum")
    law = OLD if off_policy else logits.detach()
    batch = batch_of(objective, logits, OLD if off_policy else None)
    mean = (sequence_logprobs(law).exp() * objective(batch).terms[0].losses).sum()
    at_prefix = factors * divergence_at_prefixes(divergence, logits)
    weighted = at_prefix[WORLD.prefix].masked_fill(~WORLD.mask, 0.0).sum(-1)
    exact = (sequence_logprobs(logits.detach()).exp() * weighted).sum()
    torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits), rtol=0, atol=1e-8)
    # Weights of 1 are the plain loss, bit for bit.
    ones, plain = (
        Distillation(divergence, level=level, weights=weights) for weights in ([ByPrefix(torch.ones_like(factors))], [])
    )
    assert torch.equal(gradient(ones(batch).mean(), logits), gradient(plain(batch).mean(), logits))


@pytest.mark.parametrize("level", ["sequence", "token", "vocabulary"])
def test_it_is_the_penalty_of_a_policy_gradient_without_rewards(divergence, logits, level):
    """Bit for bit, with the teacher under the name of the penalty's reference."""
    alone = Distillation(divergence, "reference", level=level, reduction="sequence_sum")
    penalty = PolicyGradient(divergence, 1.0, "none", level=level)
    at = {"divergence": divergence_at_prefixes(divergence, logits)[WORLD.prefix]} if level == "vocabulary" else {}
    batch = CompletionBatch(
        logprobs=token_logprobs(logits),
        reference_logprobs=token_logprobs(TEACHER),
        measures=at,
        completion_mask=WORLD.mask,
        prompt_index=torch.arange(N),
        rewards=torch.zeros(N, dtype=torch.float64),
    )
    ours, theirs = (gradient(objective(batch).mean(), logits) for objective in (alone, penalty))
    assert torch.equal(ours, theirs)


def test_reward_and_distillation_sum_to_reward_minus_divergence(divergence, logits):
    """KDRL with any f: the sum's mean gradient is that of ``E[r] - β D_f`` to the teacher."""
    both = Sum(
        {
            "rl": PolicyGradient(advantage="none"),
            "teacher": (Distillation(divergence, level="sequence"), BETA),
        }
    )
    drawn = sequence_logprobs(OLD).exp()
    terms = both(batch_of(both, logits, OLD, rewards=REWARDS)).terms
    mean = sum((drawn * term.scale * term.losses).sum() for term in terms)
    exact = negative_reward(logits) + BETA * textbook_sequence_divergence(divergence, logits)
    torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("level", ["vocabulary", "sequence"])
def test_a_tabular_policy_reaches_the_teacher(name, level):
    divergence = divergences.get(name).standardized()
    objective = Distillation(divergence, level=level, reduction="sequence_sum")
    logits = random_logits(0, 0.5).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=80, tolerance_grad=1e-10, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        # The value sizes the steps: were the gradient not its own, no step would fit. Fixed prefixes are those of a
        # distribution that does not move.
        law = torch.zeros_like(logits) if level == "vocabulary" else logits.detach()
        losses = objective(batch_of(objective, logits)).terms[0].losses
        (logits.grad,) = torch.autograd.grad((sequence_logprobs(law).exp() * losses).sum(), logits)
        if level == "vocabulary":
            return textbook_token_divergence(divergence, logits.detach(), law)
        return textbook_sequence_divergence(divergence, logits.detach())

    optimizer.step(closure)
    assert (logits.softmax(-1) - TEACHER.softmax(-1)).abs().max() < 1e-4
