import math

import pytest
import torch

from falign import CompletionBatch, divergences
from falign.metrics.reward_accuracy import outcomes, pair_outcomes, reward_accuracy, top1_accuracy
from falign.objectives import Listwise


def test_outcomes_of_two_rewards():
    assert outcomes([1.0, 2.0, -3.0, 1e4], [0.0, 2.0, 1.0, 1e4 + 1e-4]).tolist() == [1.0, 0.5, 0.0, 0.5]


def test_a_list_counts_with_its_pairs():
    # Preference 3 > 2 = 2 > 0: five ordered pairs, of which (0, 3) is wrong and (1, 3) tied.
    assert sorted(pair_outcomes([1.0, 2.0, 0.5, 2.0], [3, 2, 2, 0])) == [0.0, 0.0, 0.0, 0.5, 1.0]
    accuracy = reward_accuracy([[1.0, 2.0, 0.5, 2.0], [1.0, 0.0]], [[3, 2, 2, 0], [1, 0]])
    assert accuracy.value == pytest.approx(2.5 / 6)


def test_prompts_without_a_pair_say_nothing():
    assert reward_accuracy([[1.0, 0.0], [1.0, 2.0]], [[1, 0], [1, 1]]) == (1.0, 1.0, 1.0)


def test_top1_is_one_where_a_best_one_has_the_largest_reward():
    rewards = [[1.0, 0.0, 3.0, 2.0], [1.0, 0.0, 0.5, 0.2], [2.0, 2.0, 1.0, 0.0]]
    preferences = [[1, 0, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    assert top1_accuracy(rewards, preferences).value == pytest.approx((1 + 0 + 0.5) / 3)


def test_both_are_the_metrics_of_the_objective():
    generator = torch.Generator().manual_seed(0)
    size, prompts = 5, 8
    shape = (size * prompts, 1)
    logprobs, reference = -torch.rand(shape, generator=generator), -torch.rand(shape, generator=generator)
    preference = torch.randint(0, 3, (size * prompts,), generator=generator).float()
    index = torch.arange(prompts).repeat_interleave(size)
    batch = CompletionBatch(
        logprobs=logprobs,
        reference_logprobs=reference,
        completion_mask=torch.ones(shape, dtype=torch.bool),
        prompt_index=index,
        preference=preference,
    )
    objective = Listwise(divergences.get("jensen_shannon"), beta=0.3)
    rewards = objective.implicit_reward((logprobs - reference).sum(dim=-1))
    metrics = objective(batch).metrics
    lists = [values.reshape(prompts, size).tolist() for values in (rewards, preference)]
    assert reward_accuracy(*lists).value == pytest.approx(metrics["rewards/accuracies"].mean().item())
    assert top1_accuracy(*lists).value == pytest.approx(metrics["rewards/top1"].mean().item())


def test_the_interval_resamples_prompts_and_not_pairs():
    # Ten prompts of ten completions, all right or all wrong: as uncertain as ten coins, not as 450 pairs.
    up, down = [float(i) for i in range(10)], [float(-i) for i in range(10)]
    interval = reward_accuracy([up] * 5 + [down] * 5, [up] * 10)
    assert interval.value == 0.5
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 10), abs=0.1)


@pytest.mark.parametrize(
    ("rewards", "preferences", "message"),
    [
        ([[1.0]], [[1, 0]], "Prompt 0 has 1 rewards but 2 preferences"),
        ([[1.0, 2.0]], [], "1 prompts have rewards and 0 preferences"),
        ([[1.0, 2.0]], [[1, 1]], "No two completions of one prompt differ"),
        ([[1.0, 0.0], [math.nan, 2.0]], [[1, 0], [1, 0]], r"rewards\[1\] is \[nan, 2.0\]; leave out"),
    ],
)
def test_what_cannot_be_is_refused(rewards, preferences, message):
    with pytest.raises(ValueError, match=message):
        reward_accuracy(rewards, preferences)
    with pytest.raises(ValueError, match=message):
        top1_accuracy(rewards, preferences)


def test_unlike_lengths_are_refused():
    with pytest.raises(ValueError, match="2 rewards are compared with 1"):
        outcomes([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="2 rewards but 1 preferences"):
        pair_outcomes([1.0, 2.0], [1])


def test_infinite_rewards_win_lose_and_tie():
    rewards = [[math.inf, 0.0], [0.0, -math.inf], [-math.inf, math.inf], [math.inf, math.inf]]
    assert [outcomes(row[:1], row[1:])[0] for row in rewards] == [1.0, 1.0, 0.0, 0.5]
    assert reward_accuracy(rewards, [[1, 0]] * 4).value == top1_accuracy(rewards, [[1, 0]] * 4).value == 2.5 / 4
