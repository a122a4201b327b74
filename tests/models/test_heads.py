import math

import pytest
import torch

from falign.models.heads import DoubleValueHead, ValueHead
from falign.objectives import PolicyGradient
from falign.references import completion_batch
from falign.scoring import completion_scores, pad
from tests.scoring.models import TREES, tiny_model

BATCH = pad(TREES, pad_token_id=2)


def test_the_soft_minimum_is_its_formula_and_the_value_itself_where_both_agree():
    head = DoubleValueHead(4, soft_min=0.3)
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        head.slow.linear.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    found = head.target(hidden).squeeze(-1)
    for row, value in zip(hidden, found, strict=True):
        first, second = row[0].item(), row[1].item()
        assert value.item() == pytest.approx(
            -0.3 * math.log((math.exp(-first / 0.3) + math.exp(-second / 0.3)) / 2), abs=1e-5
        )
        assert min(first, second) <= value.item() <= (first + second) / 2 + 1e-6
    with torch.no_grad():
        head.slow.linear.weight[1] = head.slow.linear.weight[0]
    torch.testing.assert_close(head.target(hidden).squeeze(-1), hidden[:, 0])
    assert not head.target(hidden).requires_grad


def test_the_slow_copies_follow_once_a_step():
    head = DoubleValueHead(4, polyak=0.25)
    start = head.slow.linear.weight.clone()
    with torch.no_grad():
        head.linear.weight.add_(1.0)
    for step in (1, 1, 2):
        head.follow(step)
    torch.testing.assert_close(head.slow.linear.weight, start + 1 - 0.75**2)
    assert not torch.equal(head.linear.weight[0], head.linear.weight[1])


def test_both_values_reach_the_objective_and_each_learns_the_same_target():
    model = tiny_model()
    head = DoubleValueHead.of(model)
    with torch.no_grad():
        head.linear.bias.copy_(torch.tensor([0.5, -1.0]))
    scores = completion_scores(model, BATCH, value_head=head)
    assert scores.values.shape == scores.second_values.shape == scores.logprobs.shape
    objective = PolicyGradient(advantage="gae", importance="token", lam=1.0, value_coefficient=1.0)
    rewards = torch.arange(len(scores.values), dtype=torch.float32)
    old = completion_scores(model, BATCH, value_head=head.target).values
    batch = completion_batch(
        BATCH,
        scores.logprobs,
        {"values": scores.values, "second_values": scores.second_values, "old_values": old, "rewards": rewards},
    )
    term = objective(batch).terms[1]
    (term.losses * term.weights).sum().backward()
    mask = batch.completion_mask
    for k, values in enumerate((scores.values, scores.second_values)):  # with λ = 1 and γ = 1 the target is the reward
        error = ((values - rewards[:, None]) * mask).sum()
        assert head.linear.bias.grad[k].item() == pytest.approx(error.item(), rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_single_head_is_its_own_target():
    head = ValueHead.of(tiny_model())
    assert head.target is head
    assert completion_scores(tiny_model(), BATCH, value_head=head).second_values is None
