import pytest
import torch

from falign.objectives.advantages import ADVANTAGES, get_advantage, group_deviation

PROMPTS = torch.tensor([1, 0, 1, 0, 1])
REWARDS = torch.tensor([0.2, -1.0, 0.7, 2.0, 0.9], dtype=torch.float64)


def members(i, own):
    return [REWARDS[j].item() for j in range(5) if PROMPTS[j] == PROMPTS[i] and (own or j != i)]


def mean(values):
    return sum(values) / len(values)


def deviation(values):
    return (sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)) ** 0.5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", lambda i, r: r),
        ("batch_mean", lambda i, r: r - (REWARDS.sum().item() - r) / 4),
        ("leave_one_out", lambda i, r: r - mean(members(i, own=False))),
        ("group_centred", lambda i, r: r - mean(members(i, own=True))),
        (
            "group_normalised",
            lambda i, r: (r - mean(members(i, own=True))) / (deviation(members(i, own=True)) + 1e-4),
        ),
    ],
)
def test_advantages_are_the_textbooks(name, expected):
    values = [expected(i, r) for i, r in enumerate(REWARDS.tolist())]
    assert get_advantage(name)(REWARDS, PROMPTS).tolist() == pytest.approx(values, abs=1e-14)


def test_deviation_within_groups():
    expected = [deviation(members(i, own=True)) for i in range(5)]
    assert group_deviation(REWARDS, PROMPTS).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["batch_mean", "leave_one_out", "group_centred", "group_normalised"])
def test_equal_rewards_give_exactly_nothing(name):
    rewards = torch.full((7,), 0.1)  # whose float32 sum over 7 is not 7 times 0.1
    assert get_advantage(name)(rewards, torch.zeros(7, dtype=torch.long)).tolist() == [0.0] * 7


@pytest.mark.parametrize("name", ["leave_one_out", "batch_mean"])
def test_a_completion_without_others_is_refused_with_the_remedy(name):
    rewards, prompts = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([8, 8, 5])
    rows = slice(None) if name == "leave_one_out" else slice(2, 3)
    with pytest.raises(ValueError, match=r"has only one completion.*sample two or more"):
        get_advantage(name)(rewards[rows], prompts[rows])


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_an_empty_rollout_has_empty_advantages(name):
    assert get_advantage(name)(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_an_unknown_name_suggests_the_near_one():
    with pytest.raises(ValueError, match=r"did you mean 'leave_one_out'\? Choose one of none, .*gae"):
        get_advantage("leave_one")
