import math

import torch

from falign.objectives.groups import groups_of, logsumexp_of_others, mean_of_others, smallest, total

PROMPTS = torch.tensor([4, 9, 4, 2, 9, 4])
VALUES = torch.tensor([1.0, -2.0, 5.0, 7.0, 0.5, 3.0], dtype=torch.float64)


def others(i):
    return [VALUES[j].item() for j in range(len(VALUES)) if j != i and PROMPTS[j] == PROMPTS[i]]


def test_sums_over_interleaved_groups():
    groups = groups_of(PROMPTS)
    assert groups.size.tolist() == [3, 2, 3, 1, 2, 3]
    assert total(VALUES, groups).tolist() == [9.0, -1.5, 9.0, 7.0, -1.5, 9.0]
    assert smallest(VALUES, groups).tolist() == [1.0, -2.0, 1.0, 7.0, -2.0, 1.0]


def test_means_and_log_sums_of_the_others():
    groups = groups_of(PROMPTS)
    means = [sum(others(i)) / max(len(others(i)), 1) for i in range(len(VALUES))]
    assert mean_of_others(VALUES, groups).tolist() == means
    logs = [math.log(sum(map(math.exp, others(i)))) if others(i) else -math.inf for i in range(len(VALUES))]
    torch.testing.assert_close(logsumexp_of_others(VALUES, groups), torch.tensor(logs, dtype=torch.float64))


def test_a_huge_value_of_its_own_does_not_show_in_the_mean_of_the_others():
    groups = groups_of(torch.zeros(3, dtype=torch.long))
    assert mean_of_others(torch.tensor([1e20, 1.0, 3.0]), groups)[0].item() == 2.0
    assert logsumexp_of_others(torch.tensor([1e4, 0.0, -math.inf]), groups)[0].item() == 0.0


def test_weights_that_are_all_zero_have_an_empty_log_sum_and_no_nan():
    groups = groups_of(torch.zeros(3, dtype=torch.long))
    assert logsumexp_of_others(torch.full((3,), -math.inf), groups).tolist() == [-math.inf] * 3


def test_no_completions_are_no_groups():
    groups, empty = groups_of(torch.zeros(0, dtype=torch.long)), torch.zeros(0)
    for function in (total, smallest, mean_of_others, logsumexp_of_others):
        assert function(empty, groups).shape == (0,)
