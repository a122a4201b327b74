import json
import math

import pytest
import torch

from falign.objectives import RunningPartition, log_partition

LOG = lambda *weights: torch.tensor(weights, dtype=torch.float64).log()  # noqa: E731


def test_the_estimate_is_the_mean_of_the_others():
    estimate = log_partition(LOG(1, 2, 6, 5), torch.tensor([0, 0, 0, 1])).exp()
    assert estimate.tolist() == pytest.approx([4.0, 3.5, 1.5, 0.0])


def test_earlier_sums_are_merged_by_their_counts():
    estimate = log_partition(
        LOG(1, 3, 5),
        torch.tensor([0, 0, 1]),
        earlier_log_sum=LOG(10, 10, 0),
        earlier_count=torch.tensor([4.0, 4.0, 2.0]).double(),
    )
    assert estimate.exp().tolist() == pytest.approx([13 / 5, 11 / 5, 0.0])


def test_a_sample_never_sees_its_own_weight():
    running, changed = RunningPartition(), RunningPartition()
    for each in (running, changed):
        each.update(["a", "a", "b"], LOG(1, 2, 3))
    now, other = running.update(["a", "b", "a"], LOG(7, 8, 9)), changed.update(["a", "b", "a"], LOG(7e9, 8e9, 9))
    assert now[:2].tolist() == other[:2].tolist()
    assert now.exp().tolist() == pytest.approx([(1 + 2 + 9) / 3, 3.0, (1 + 2 + 7) / 3])


def test_where_nothing_else_is_known_the_estimate_is_minus_infinity():
    running = RunningPartition()
    assert running.update(["a", "b", "b"], LOG(1, 0, 0)).tolist() == [-math.inf] * 3
    assert running.update(["a", "b"], LOG(5, 4)).exp().tolist() == pytest.approx([1.0, 0.0])
    assert running.update(["b"], LOG(1)).exp().item() == pytest.approx(4 / 3)
    assert running.update([], torch.zeros(0)).shape == (0,)


def test_huge_weights_stay_in_the_log():
    estimate = RunningPartition().update(["a"] * 3, torch.tensor([1e4, -1e4, 1e4]))
    assert estimate.tolist() == pytest.approx([1e4 - math.log(2), 1e4, 1e4 - math.log(2)])
    assert estimate.dtype == torch.float32


def test_the_state_is_plain_and_comes_back():
    running = RunningPartition()
    running.update(["a", "b", "a"], LOG(1, 2, 3))
    restored = RunningPartition()
    restored.load_state_dict(json.loads(json.dumps(running.state_dict())))
    again = LOG(4, 5)
    assert restored.update(["a", "b"], again).tolist() == running.update(["a", "b"], again).tolist()


def test_keys_and_weights_are_counted():
    with pytest.raises(ValueError, match="2 keys for 3 log_weights"):
        RunningPartition().update(["a", "b"], LOG(1, 2, 3))
