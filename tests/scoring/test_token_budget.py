import pytest
from hypothesis import given
from hypothesis import strategies as st

from falign.scoring import TokenBudgetBatches

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=80)


@given(lengths=LENGTHS, extra=st.integers(0, 200), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_each_epoch_has_every_tree_once_within_the_budget(lengths, extra, seed, epoch):
    budget = max(lengths) + extra
    batches = TokenBudgetBatches(lengths, max_tokens=budget, seed=seed)
    batches.set_epoch(epoch)
    made = list(batches)
    assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= budget for batch in made)
    assert all(made)
    assert len(batches) == len(made)


def test_the_same_seed_and_epoch_give_the_same_batches_and_others_do_not():
    lengths = [(7 * i) % 40 + 1 for i in range(200)]

    def batches(seed, epoch):
        sampler = TokenBudgetBatches(lengths, max_tokens=100, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(0, 1) == batches(0, 1)
    assert batches(0, 1) != batches(0, 2)
    assert batches(0, 1) != batches(1, 1)


def test_batches_hold_trees_of_similar_length():
    lengths = [(37 * i) % 97 + 3 for i in range(500)]
    made = list(TokenBudgetBatches(lengths, max_tokens=400, seed=0))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in made]
    assert sum(spread) / len(spread) < 15  # of about 90 without sorting


def test_a_tree_beyond_the_budget_and_no_tree_are_refused():
    with pytest.raises(ValueError, match=r"max_tokens=10 is less than the 11 tokens of tree 1: raise it"):
        TokenBudgetBatches([3, 11], max_tokens=10, seed=0)
    with pytest.raises(ValueError, match="lengths is empty"):
        TokenBudgetBatches([], max_tokens=10, seed=0)
