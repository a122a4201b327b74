import random

from falign.rollouts.transformers_engine import sampling_batches


def test_every_row_is_in_one_batch_and_every_batch_within_the_budget():
    rng = random.Random(0)
    lengths = [rng.randrange(1, 60) for _ in range(37)]
    batches = sampling_batches(lengths, 4, max_new_tokens=10, max_batch_tokens=400)
    assert sorted(row for batch in batches for row in batch) == list(range(37 * 4))
    for batch in batches:
        assert len(batch) * (max(lengths[row // 4] for row in batch) + 10) <= 400


def test_groups_stay_together_while_they_fit():
    batches = sampling_batches([5, 30, 7, 6], 4, max_new_tokens=10, max_batch_tokens=160)
    assert batches == [[4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [0, 1, 2, 3]]


def test_a_group_too_large_is_cut_and_a_row_too_long_goes_alone():
    assert sampling_batches([5], 5, max_new_tokens=5, max_batch_tokens=20) == [[0, 1], [2, 3], [4]]
    assert sampling_batches([50], 2, max_new_tokens=5, max_batch_tokens=20) == [[0], [1]]
