import torch
from transformers import DynamicCache

from falign.rollouts.decoding import RoomyLayer, spread


def states(rows, tokens, seed):
    return torch.randn(2, rows, 3, tokens, 4, generator=torch.Generator().manual_seed(seed)).unbind()


def filled():
    cache = DynamicCache()
    cache.update(*states(3, 5, seed=0), 0)
    return cache


def test_rows_are_repeated_left_out_and_grown_as_by_the_parent():
    cache, plain = filled(), filled()
    first, second = torch.tensor([0, 0, 2, 1]), torch.tensor([3, 0])
    spread(cache, first, room=3)
    plain.reorder_cache(first)
    for seed in (1, 2):
        found, expected = cache.update(*states(4, 1, seed), 0), plain.update(*states(4, 1, seed), 0)
        assert torch.equal(torch.stack(found), torch.stack(expected))
    spread(cache, second, room=1)
    plain.reorder_cache(second)
    assert cache.get_seq_length() == plain.get_seq_length() == 7
    found, expected = cache.update(*states(2, 1, seed=3), 0), plain.update(*states(2, 1, seed=3), 0)
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_a_further_token_copies_nothing_of_those_before_it():
    cache = filled()
    spread(cache, torch.arange(3), room=4)
    places = {cache.update(*states(3, 1, seed), 0)[0].data_ptr() for seed in range(4)}
    assert len(places) == 1
    assert type(cache.layers[0]) is RoomyLayer


def test_rows_of_the_source_are_not_shared():
    cache = filled()
    before = cache.layers[0].keys.clone()
    keys = cache.layers[0].keys
    spread(cache, torch.tensor([1]), room=1)
    cache.layers[0].keys.zero_()
    assert torch.equal(keys, before)
