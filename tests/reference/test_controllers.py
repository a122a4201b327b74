"""Controllers on exact expectations: the gradient of a root, and closed loops that arrive at their targets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from falign import CompletionBatch, divergences
from falign.objectives import Controller, PolicyGradient, RootDivergence, Scheduled, TargetDivergence
from tests.reference.world import WORLD, random_logits, sequence_logprobs, token_logprobs

TWELVE = [{"alpha": "alpha(0.3)", "generalized_js": "generalized_js(0.3)"}.get(n, n) for n in divergences.names()]
REFERENCE, REWARDS = random_logits(1), torch.linspace(-1, 1, len(WORLD.tokens), dtype=torch.float64).sin()


def batch(logits: Tensor) -> CompletionBatch:
    return CompletionBatch(
        logprobs=token_logprobs(logits),
        reference_logprobs=token_logprobs(REFERENCE),
        completion_mask=WORLD.mask,
        prompt_index=torch.arange(len(WORLD.tokens)),
        rewards=REWARDS,
    )


def exact(objective, logits: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The mean gradient over all completions of the policy, and the means of the metrics."""
    logits = logits.clone().requires_grad_()
    drawn = sequence_logprobs(logits).detach().exp()
    output = objective(batch(logits))
    (gradient,) = torch.autograd.grad((drawn * output.terms[0].losses).sum(), logits)
    return gradient, {name: (drawn * values).sum().item() for name, values in output.metrics.items()}


def divergence(name: str, logits: Tensor) -> Tensor:
    log_ref = sequence_logprobs(REFERENCE)
    return (log_ref.exp() * divergences.get(name).f(sequence_logprobs(logits) - log_ref)).sum()


@pytest.mark.parametrize("name", TWELVE)
def test_the_gradient_under_a_root_controller_is_that_of_the_root(name):
    logits, strength = random_logits(2), 0.7
    scheduled = Scheduled(
        PolicyGradient(divergences.get(name), beta=1.0, advantage="none"), {"beta": RootDivergence(strength)}
    )
    (controller,) = scheduled.controllers.values()
    _, metrics = exact(scheduled.at(0), logits)
    state = controller.after(controller.start_state(), scheduled.observed(metrics)["beta"])
    gradient, _ = exact(scheduled.controlled({"beta": controller.value(state)}).at(0), logits)
    free = logits.clone().requires_grad_()
    value = strength * divergence(name, free).sqrt() - (sequence_logprobs(free).exp() * REWARDS).sum()
    (expected,) = torch.autograd.grad(value, free)
    assert (gradient - expected).abs().max() < 1e-12


# One token decides in the closed loops, which take hundreds of steps.
LOG_REF = (torch.tensor([1, 2, 3, 4, 6, 4]) / 20).double().log()
WORTH = torch.tensor([1.2, -0.3, 0.4, 0.0, 0.8, -1.0], dtype=torch.float64)


def follow(
    objective: PolicyGradient, controller: Controller, *, steps: int, rate: float
) -> tuple[Tensor, float, float]:
    """The policy after gradient descent with exact expectations and one observation a step, its β and divergence."""
    scheduled = Scheduled(objective, {"beta": controller})
    logits, state, observed = LOG_REF.clone(), controller.start_state(), 0.0
    for _ in range(steps):
        logits.requires_grad_()
        outcomes = CompletionBatch(
            logprobs=logits.log_softmax(-1)[:, None],
            reference_logprobs=LOG_REF[:, None],
            completion_mask=torch.ones(6, 1, dtype=torch.bool),
            prompt_index=torch.arange(6),
            rewards=WORTH,
        )
        output, drawn = replace(objective, beta=controller.value(state))(outcomes), logits.softmax(-1).detach()
        (gradient,) = torch.autograd.grad((drawn * output.terms[0].losses).sum(), logits)
        observed = scheduled.observed({name: (drawn * value).sum().item() for name, value in output.metrics.items()})
        state = controller.after(state, observed["beta"])
        logits = (logits - rate * gradient).detach()
    return logits.log_softmax(-1), controller.value(state), observed["beta"]


@pytest.mark.parametrize(("name", "start", "smoothing"), [("reverse_kl", 0.3, 0.0), ("jensen_shannon", 1.5, 0.5)])
def test_the_closed_loop_holds_its_target(name, start, smoothing):
    f = divergences.get(name)
    hold = TargetDivergence(0.1, start, gain=0.1, smoothing=smoothing)
    policy, beta, measured = follow(PolicyGradient(f, beta=1.0, advantage="none"), hold, steps=400, rate=3)
    assert (LOG_REF.exp() * f.f(policy - LOG_REF)).sum().item() == pytest.approx(0.1, abs=1e-4)
    assert measured == pytest.approx(0.1, abs=1e-4)
    # The policy has the largest reward at this divergence: f'(u) = r/β up to a constant.
    slope = beta * f.f_prime(policy - LOG_REF) - WORTH
    assert (slope - slope.mean()).abs().max() < 1e-3


def test_the_closed_loop_of_a_root_arrives_at_the_optimum_of_the_root():
    # The rate is below that at which the steps would grow: 2 over β at the floor times the curvature.
    f, strength = divergences.get("reverse_kl"), 0.85
    policy, beta, measured = follow(
        PolicyGradient(f, beta=1.0, advantage="none"), RootDivergence(strength, 0.01), steps=400, rate=1
    )
    divergence = (policy.exp() * (policy - LOG_REF)).sum().item()
    assert beta == pytest.approx(strength / (2 * divergence**0.5), abs=1e-4)
    assert measured == pytest.approx(divergence, abs=1e-4)
    torch.testing.assert_close(policy, (LOG_REF + WORTH / beta).log_softmax(0), rtol=0, atol=1e-3)
    assert divergence > 0.05
