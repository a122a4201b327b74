import math
from itertools import combinations
from statistics import mean

import pytest

from falign.metrics.pass_at_k import pass_at_k, pass_at_k_per_prompt


@pytest.mark.parametrize("k", [1, 2, 4])
def test_prompts_may_have_different_numbers_of_samples(k):
    rewards = [[0.5, 1.0, 0.2, 0.7], [0.0] * 5, [0.1, 0.9, 1.5, 0.0, 0.0, 0.0]]
    expected = [mean(any(r >= 0.7 for r in chosen) for chosen in combinations(row, k)) for row in rewards]
    assert pass_at_k_per_prompt(rewards, k, pass_reward=0.7) == pytest.approx(expected)
    assert pass_at_k(rewards, k, pass_reward=0.7).value == pytest.approx(mean(expected))


def test_the_interval_resamples_prompts():
    rewards = [[1.0] * 50] * 32 + [[0.0] * 50] * 32
    value, low, high = pass_at_k(rewards, 1)
    assert value == 0.5
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 8, abs=0.05)


@pytest.mark.parametrize(
    ("rewards", "k", "message"),
    [
        ([], 1, "There are no prompts"),
        ([[1.0, 0.0], [1.0]], 2, r"rewards\[1\] has 1 samples; pass@2 needs"),
        ([[1.0]], 0, r"rewards\[0\] has 1 samples; pass@0 needs"),
        ([[1.0], [0.0, math.nan]], 1, r"rewards\[1\] is \[0.0, nan\]; leave out"),
    ],
)
def test_what_cannot_be_is_refused(rewards, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(rewards, k)


def test_a_reward_that_passes_is_a_number():
    with pytest.raises(ValueError, match="pass_reward is nan"):
        pass_at_k([[1.0]], 1, pass_reward=math.nan)
