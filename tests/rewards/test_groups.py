from itertools import combinations
from statistics import mean

import pytest
import torch

from falign.rewards import best_of_n, calibrate, group_shares, keep, pass_at_k, pass_rates


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_pass_at_k_is_the_share_of_choices_with_a_correct_sample(k):
    n = 6
    expected = [mean(any(i < c for i in chosen) for chosen in combinations(range(n), k)) for c in range(n + 1)]
    actual = pass_at_k(n, torch.arange(n + 1), k)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


def test_pass_at_k_is_exact_for_many_samples():
    # 1 - (9999/10000) (9998/9999) ... telescopes to k/n for one correct sample.
    assert pass_at_k(10_000, torch.tensor([1]), 37).item() == pytest.approx(0.0037, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_choices(n):
    rewards = torch.tensor([[0.5, -1.0, 2.0, 2.0, 0.0], [3.0, 1.0, -2.0, 0.25, 7.0]])
    expected = [mean(max(chosen) for chosen in combinations(row.tolist(), n)) for row in rewards]
    torch.testing.assert_close(best_of_n(rewards, n), torch.tensor(expected, dtype=torch.float64))


def test_best_of_n_of_outcomes_is_pass_at_k():
    outcomes = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0], [0.0] * 5, [1.0] * 5])
    torch.testing.assert_close(best_of_n(outcomes, 3), pass_at_k(5, outcomes.sum(dim=-1).long(), 3))


def test_shares_of_groups():
    rewards = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.25, 0.5]])
    assert group_shares(rewards) == (0.25, 0.5, 0.25, 0.5)
    assert group_shares(rewards, threshold=0.5) == (0.25, 0.25, 0.5, 0.5)
    nearly = torch.tensor([[1.0, 1.0 - 1e-7], [1.0, 1.0 - 1e-3]])
    assert group_shares(nearly) == (0.5, 0.0, 0.5, 0.5)
    assert group_shares(nearly, tolerance=0.01) == (1.0, 0.0, 0.0, 1.0)


def test_prompts_are_kept_by_their_rate_of_passing():
    rates = pass_rates(torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0] * 4, [0.0] * 4]))
    assert rates.tolist() == [0.5, 1.0, 0.0]
    assert keep(rates, 0.2, 0.8).tolist() == [True, False, False]
    assert keep(rates, 0.5, 1.0).tolist() == [True, True, False]


def test_calibration_is_the_win_rate_per_prompt_and_does_not_see_the_scale():
    rewards, reference = torch.tensor([[0.0, 2.0, 9.0], [5.0, 1.0, 1.0]]), torch.tensor([[1.0, 2.0], [1.0, 1.0]])
    expected = torch.tensor([[0.0, 0.75, 1.0], [1.0, 0.5, 0.5]])
    assert torch.equal(calibrate(rewards, reference), expected)
    assert torch.equal(calibrate(torch.exp(rewards), torch.exp(reference)), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k(4, torch.tensor([1]), 5), "k=5 must be between 1 and the 4 samples"),
        (lambda: pass_at_k(4, torch.tensor([5]), 2), "values outside 0 to 4"),
        (lambda: best_of_n(torch.zeros(2, 3), 4), "n=4 must be between 1 and the 3 rewards"),
        (lambda: keep(torch.zeros(2), 0.8, 0.2), "0 <= low <= high <= 1"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
