import pytest

from falign.scoring import TokenBudgetBatches
from falign.training.batch_sharding import RowBatches, Share

LENGTHS = [3, 9, 4, 4, 7, 2, 8, 5, 6]


@pytest.mark.parametrize("processes", [1, 2, 4, 12])
@pytest.mark.parametrize(
    "batches",
    [lambda: RowBatches(9, size=2, seed=3), lambda: TokenBudgetBatches(LENGTHS, max_tokens=12, seed=3)],
    ids=["rows", "tokens"],
)
def test_every_row_comes_once_and_each_step_has_the_rows_of_one_process(batches, processes):
    shares = [list(Share(batches(), rank=rank, processes=processes)) for rank in range(processes)]
    assert {len(share) for share in shares} == {len(Share(batches(), rank=0, processes=processes))}
    together = [batch for step in zip(*shares, strict=True) for batch in step]
    assert [batch for batch in together if batch] == list(batches())
    assert sorted(row for batch in together for row in batch) == list(range(9))


def test_each_epoch_has_an_order_of_its_own_that_its_number_gives():
    share = Share(RowBatches(50, size=7, seed=3), rank=1, processes=2)
    first = list(share)
    share.set_epoch(1)
    second = list(share)
    assert second != first
    share.set_epoch(0)
    assert list(share) == first


@pytest.mark.parametrize(
    "batches",
    [
        lambda seed: RowBatches(50, size=7, seed=seed),
        lambda seed: TokenBudgetBatches([5] * 50, max_tokens=35, seed=seed),
    ],
)
def test_neighboring_seeds_share_no_order(batches):
    orders = []
    for seed in range(3):
        for epoch in range(3):
            drawn = batches(seed)
            drawn.set_epoch(epoch)
            orders.append(tuple(row for batch in drawn for row in batch))
    assert len(set(orders)) == 9
