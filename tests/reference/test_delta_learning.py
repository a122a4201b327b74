"""Delta learning: answers of a weak model chosen over a weaker one's improve a stronger model, in closed form.

With π_weak and π_weaker as the sources of chosen and rejected completions, the logistic loss is least at the margin
``log π_weak/π_weaker (y_w) - log π_weak/π_weaker (y_l)``, whatever the student. So f-DPO arrives at the policy whose
implicit rewards ``β f'(π/π_student)`` are the log-ratios of the two, up to a constant.
"""

from __future__ import annotations

import pytest
import torch

from falign import CompletionBatch, divergences
from falign.methods import FDPO
from falign.objectives import Supervised

REWARD = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0], dtype=torch.float64)
BASE = torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3], dtype=torch.float64).log()
N = len(REWARD)


def tilted(strength: float) -> torch.Tensor:
    return (BASE + strength * REWARD).log_softmax(0)


WEAKER, WEAK, STUDENT = tilted(0.2), tilted(0.6), tilted(1.0)
CHOSEN, REJECTED = (index.flatten() for index in torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij"))


def minimized(loss, start: torch.Tensor) -> torch.Tensor:
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def learned(divergence: str, beta: float) -> torch.Tensor:
    """The student after f-DPO on all pairs, each as often as the two models draw it."""
    completions = torch.stack([CHOSEN, REJECTED], dim=1).flatten()
    chances = (WEAK[CHOSEN] + WEAKER[REJECTED]).exp()

    def loss(log_policy: torch.Tensor) -> torch.Tensor:
        batch = CompletionBatch(
            logprobs=log_policy[completions][:, None],
            reference_logprobs=STUDENT[completions][:, None],
            completion_mask=torch.ones(2 * N * N, 1, dtype=torch.bool),
            prompt_index=torch.arange(N * N).repeat_interleave(2),
            preference=torch.tensor([1.0, 0.0]).repeat(N * N),
        )
        ((losses, *_),) = FDPO(divergence, beta)(batch).terms
        # An answer may be drawn by both models: such a pair is chosen and rejected in equal measure, at margin 0.
        return (chances * losses).sum()

    return minimized(loss, STUDENT)


def expected(log_policy: torch.Tensor) -> float:
    return (log_policy.exp() * REWARD).sum().item()


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon", "forward_kl", "alpha(0.5)"])
def test_f_dpo_moves_the_student_by_the_difference_of_the_two(divergence):
    beta = 1.0
    policy = learned(divergence, beta)
    rewards = beta * divergences.get(divergence).f_prime(policy - STUDENT)
    wanted = WEAK - WEAKER
    torch.testing.assert_close(rewards - rewards.mean(), wanted - wanted.mean(), rtol=0, atol=1e-6)
    if divergence == "reverse_kl":
        torch.testing.assert_close(policy, (STUDENT + (WEAK - WEAKER) / beta).log_softmax(0), rtol=0, atol=1e-6)


def test_the_student_improves_beyond_its_teachers_and_imitation_makes_it_worse():
    improved = learned("reverse_kl", 0.5)

    def imitation(log_policy: torch.Tensor) -> torch.Tensor:
        batch = CompletionBatch(
            logprobs=log_policy[:, None],
            completion_mask=torch.ones(N, 1, dtype=torch.bool),
            prompt_index=torch.arange(N),
        )
        ((losses, *_),) = Supervised()(batch).terms
        return (WEAK.exp() * losses).sum()

    imitated = minimized(imitation, STUDENT)
    torch.testing.assert_close(imitated.exp(), WEAK.exp(), rtol=0, atol=1e-6)
    assert expected(WEAKER) < expected(imitated) < expected(STUDENT) < expected(improved)
