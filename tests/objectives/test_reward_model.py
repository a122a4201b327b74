"""Reward models: losses and gradients against closed forms and autograd of TRL's formula in float64."""

import math
from itertools import permutations

import pytest
import torch

from falign import CompletionBatch
from falign.objectives import RankedRewardModel, RewardModel, Selected, Sum, Supervised


def batch_of(rewards, preference, prompts=None, **fields):
    n = len(rewards)
    return CompletionBatch(
        logprobs=torch.full((n, 1), torch.nan),
        completion_mask=torch.ones(n, 1, dtype=torch.bool),
        prompt_index=torch.tensor([0] * n if prompts is None else prompts),
        preference=torch.tensor(preference),
        learned_rewards=rewards,
        **fields,
    )


def test_value_and_gradient_are_those_of_bradley_terry_with_margin_and_centering():
    rewards = torch.tensor([0.7, -0.4, 1.1, 0.2], dtype=torch.float64, requires_grad=True)
    batch = batch_of(rewards, [1.0, 0.0, 0.0, 1.0], [0, 0, 1, 1], margin=torch.tensor([0.3, 0.3, 2.0, 2.0]).double())
    loss = RewardModel(0.05, margin="data")(batch).mean()
    loss.backward()
    leads, sums = [1.1 - 0.3, -0.9 - 2.0], [0.3, 1.3]
    expected = sum(math.log1p(math.exp(-lead)) for lead in leads) / 2 + 0.05 * sum(each**2 for each in sums) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-7)
    pull = [-1 / (1 + math.exp(lead)) / 2 for lead in leads]
    gradient = [pull[0], -pull[0], -pull[1], pull[1]]
    center = [0.05 * 2 * each / 2 for each in (0.3, 0.3, 1.3, 1.3)]
    wanted = [g + c for g, c in zip(gradient, center, strict=True)]
    torch.testing.assert_close(rewards.grad, torch.tensor(wanted).double(), rtol=1e-6, atol=0)


def test_label_smoothing_rests_where_the_labels_say():
    lead = math.log(0.9 / 0.1)
    rewards = torch.tensor([lead, 0.0], dtype=torch.float64, requires_grad=True)
    RewardModel(margin_loss="conservative(0.1)")(batch_of(rewards, [1.0, 0.0])).mean().backward()
    assert rewards.grad.abs().max() < 1e-12


def test_rankings_are_a_distribution_and_two_are_bradley_terry():
    rewards = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
    likelihoods = [
        math.exp(-RankedRewardModel()(batch_of(rewards, [*map(float, p)])).mean()) for p in permutations(range(3))
    ]
    assert sum(likelihoods) == pytest.approx(1.0, rel=1e-12)
    pair = batch_of(rewards[:2], [0.0, 1.0])
    ranked, paired = RankedRewardModel(0.1)(pair), RewardModel(0.1)(pair)
    assert ranked.mean().item() == pytest.approx(paired.mean().item(), rel=1e-12)
    assert ranked.metrics["rewards/accuracies"].item() == 0.0


def test_centering_moves_the_rewards_to_zero_and_not_their_lead():
    rewards = torch.tensor([5.0, 3.0], dtype=torch.float64, requires_grad=True)
    for objective in (RewardModel(0.1), RankedRewardModel(0.1)):
        rewards.grad = None
        objective(batch_of(rewards, [1.0, 0.0])).mean().backward()
        # The lead's gradients cancel in the sum, and the centering's in the difference.
        assert rewards.grad.sum().item() == pytest.approx(2 * 0.1 * 2 * 8.0)
        assert (rewards.grad[0] - rewards.grad[1]).item() == pytest.approx(-2 / (1 + math.exp(2.0)))


def test_it_reads_no_log_probabilities_alone_and_those_of_a_term_beside_it():
    assert not RewardModel().reads_logprobs
    assert not RankedRewardModel().reads_logprobs
    assert not Sum({"a": RewardModel()}).reads_logprobs
    assert Sum({"a": RewardModel(), "sft": Selected(Supervised(), "chosen")}).reads_logprobs
    assert RewardModel()(batch_of(torch.tensor([1.0, 0.0]), [1.0, 0.0])).mean().isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardModel(-0.1), "centering=-0.1 must not be negative"),
        (lambda: RewardModel(margin_loss="ipo"), "needs log-ratios per token"),
        (lambda: RankedRewardModel(math.nan), "centering"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_batch_without_rewards_is_refused():
    batch = batch_of(torch.tensor([1.0, 0.0]), [1.0, 0.0])
    with pytest.raises(ValueError, match="learned_rewards"):
        RewardModel()(CompletionBatch.of({k: v for k, v in batch.tensors().items() if k != "learned_rewards"}))
