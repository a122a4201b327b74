"""Nash mirror prox on rock, paper, scissors with a reference that is not uniform: exact expectations, last iterate."""

from __future__ import annotations

import itertools

import pytest
import torch

from falign import CompletionBatch, divergences
from falign.methods import NashMirrorProx
from falign.objectives import PolicyGradient
from falign.rewards import OracleReward

HANDS = "rps"
# P(row ≻ column); rock beats scissors more surely than scissors beat paper, so the equilibrium is not the reference.
BEATS = torch.tensor([[0.5, 0.1, 1.0], [0.9, 0.5, 0.2], [0.0, 0.8, 0.5]], dtype=torch.float64)
LOG_REF = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
BETA, ETA = 0.2, 3.0
PAIRS = list(itertools.product(range(3), repeat=2))


def oracle(first, second):
    return [BEATS[HANDS.index(a), HANDS.index(b)].item() for a, b in zip(first, second, strict=True)]


DRAWN = [hand for pair in PAIRS for hand in pair]
GROUPS = torch.arange(len(PAIRS)).repeat_interleave(2)
REWARDS = torch.tensor(
    OracleReward(oracle)([f"pair {i}" for i in GROUPS.tolist()], [HANDS[hand] for hand in DRAWN]), dtype=torch.float64
)


def equilibrium() -> torch.Tensor:
    """The fixed point of ``π = softmax(log π_ref + P π/β)``, by relaxation and then by Newton's method."""
    logits = LOG_REF.clone()
    for _ in range(1500):
        logits = logits + 0.01 * (LOG_REF + BEATS @ logits.softmax(0) / BETA - logits)
    for _ in range(5):

        def residual(x):
            return LOG_REF + BEATS @ x.softmax(0) / BETA - x

        jacobian = torch.autograd.functional.jacobian(residual, logits)
        logits = logits - torch.linalg.solve(jacobian, residual(logits))
    policy = logits.softmax(0)
    best = (LOG_REF + BEATS @ policy / BETA).softmax(0)
    torch.testing.assert_close(policy, best, rtol=0, atol=1e-14)
    return policy


def expected_gradient(objective, logits, sampled, previous):
    """The exact gradient of the objective's mean over all groups of two that ``sampled`` can draw."""
    logits = logits.clone().requires_grad_()

    def of(log_probs):
        return log_probs.log_softmax(0)[DRAWN][:, None]

    batch = CompletionBatch(
        logprobs=of(logits),
        old_logprobs=of(sampled),
        reference_logprobs=of(LOG_REF),
        references={"previous": of(previous)},
        completion_mask=torch.ones(len(DRAWN), 1, dtype=torch.bool),
        prompt_index=GROUPS,
        rewards=REWARDS,
    )
    before = CompletionBatch.of({**batch.tensors(), "logprobs": of(sampled)})  # as a rollout is prepared
    prepared = objective.prepare(before)
    batch = CompletionBatch.of({**prepared.tensors(), "logprobs": of(logits)})
    chances = torch.tensor([sampled.softmax(0)[list(pair)].prod().item() for pair in PAIRS], dtype=torch.float64)
    weights = chances.repeat_interleave(2) / 2
    total = sum(term.scale * (weights * term.losses).sum() for term in objective(batch).terms)
    return torch.autograd.grad(total, logits)[0]


def value(logits, opponent, previous):
    policy = logits.softmax(0)
    to_reference = (policy * (logits.log_softmax(0) - LOG_REF)).sum()
    to_previous = (policy * (logits.log_softmax(0) - previous.log_softmax(0))).sum()
    return policy @ BEATS @ opponent.softmax(0) - BETA * to_reference - to_previous / ETA


def random(seed):
    return torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_gradient_of_a_half_step_is_that_of_its_value(on_policy):
    """Also after further updates on the same rollout, whose opponents are still those that were sampled."""
    sampled, previous = random(0), random(1)
    logits = sampled if on_policy else random(2)
    found = expected_gradient(NashMirrorProx(beta=BETA, eta=ETA), logits, sampled, previous)
    point = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(-value(point, sampled, previous), point)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-14)


def test_a_leave_one_out_baseline_would_double_the_gradient_of_a_pair():
    sampled = random(0)
    plain, centred, out = (
        expected_gradient(PolicyGradient(advantage=name), sampled, sampled, sampled)
        for name in ("none", "group_centred", "leave_one_out")
    )
    torch.testing.assert_close(centred, plain, rtol=0, atol=1e-15)
    torch.testing.assert_close(out, 2 * plain, rtol=0, atol=1e-15)


def solved(objective, sampled, previous):
    """The argmax of a half step: for a softmax, one natural gradient step of size 1/(β + 1/η) is exact."""
    gradient = expected_gradient(objective, sampled, sampled, previous)
    return (sampled - gradient / sampled.softmax(0) / (BETA + 1 / ETA)).log_softmax(0)


def test_the_last_iterate_is_the_nash_equilibrium():
    objective, expected = NashMirrorProx(beta=BETA, eta=ETA), equilibrium()
    assert (expected - LOG_REF.exp()).abs().max() > 0.1
    policy, errors = LOG_REF.clone(), []
    for _ in range(40):
        halfway = solved(objective, policy, policy)
        policy = solved(objective, halfway, policy)
        errors.append((policy.softmax(0) - expected).abs().max().item())
    assert errors[-1] < 1e-9
    # Linear convergence, faster than the paper's bound of ten iterations.
    assert errors[29] / errors[19] < (1 + 2 * BETA) ** -5


def test_one_half_step_alone_converges_more_slowly():
    """The policy against itself, which is mirror descent: why there is a second half step."""
    objective, expected = NashMirrorProx(beta=BETA, eta=ETA), equilibrium()
    prox = descent = LOG_REF.clone()
    for _ in range(20):
        prox = solved(objective, solved(objective, prox, prox), prox)
        descent = solved(objective, descent, descent)
    distances = [(policy.softmax(0) - expected).abs().max().item() for policy in (prox, descent)]
    assert distances[0] < distances[1] / 10


def test_the_divergence_of_the_first_penalty_is_free():
    found = expected_gradient(
        NashMirrorProx(beta=BETA, eta=ETA, divergence="jensen_shannon"), random(0), random(0), random(1)
    )
    point = random(0).requires_grad_()
    policy, log_ratio = point.softmax(0), point.log_softmax(0) - LOG_REF
    penalty = (LOG_REF.exp() * divergences.get("jensen_shannon").f(log_ratio)).sum()
    to_previous = (policy * (point.log_softmax(0) - random(1).log_softmax(0))).sum()
    exact = torch.autograd.grad(BETA * penalty + to_previous / ETA - policy @ BEATS @ random(0).softmax(0), point)[0]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-14)
