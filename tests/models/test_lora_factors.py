import pytest
import torch

from falign.models.lora_factors import Factors, cut_to_rank, factors_of, weighted_sum
from falign.models.merging import lora_delta
from falign.models.structure import lora_layers
from tests.models.tiny import fill_adapter, tiny_model
from tests.scoring.models import with_lora


def random_factors(out, width, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator))


def test_the_sum_is_that_of_the_products_and_not_the_product_of_the_sums():
    members = [random_factors(7, 5, rank, seed=rank) for rank in (1, 3)]
    up, down = weighted_sum([0.3, 0.7], members)
    expected = sum(w * (f.up.double() @ f.down.double()) for w, f in zip([0.3, 0.7], members, strict=True))
    assert up.shape == (7, 4)
    torch.testing.assert_close(up.double() @ down.double(), expected, rtol=0, atol=1e-6)


def test_factors_of_a_model_carry_the_adapters_scale():
    model = fill_adapter(with_lora(tiny_model("llama"), r=3, lora_alpha=5, use_rslora=True))
    found = factors_of(model, "default")
    assert len(found) == 4
    for name, layer in lora_layers(model, "default").items():
        torch.testing.assert_close(found[name].up @ found[name].down, lora_delta(layer, "default"))


@pytest.mark.parametrize(("out", "width", "rank"), [(40, 30, 6), (4, 30, 6), (5, 3, 6)])
def test_a_rank_that_is_enough_loses_nothing(out, width, rank):
    factors = random_factors(out, width, 6, seed=0)
    (up, down), discarded, total = cut_to_rank(factors, rank)
    product = factors.up.double() @ factors.down.double()
    assert (up.shape, down.shape) == ((out, rank), (rank, width))
    torch.testing.assert_close(up.double() @ down.double(), product, rtol=0, atol=1e-5)
    assert discarded <= 1e-20 * total
    assert total.item() == pytest.approx(product.square().sum().item())


def test_a_smaller_rank_gives_the_nearest_update_and_its_distance():
    factors = random_factors(12, 9, 6, seed=1)
    product = factors.up.double() @ factors.down.double()
    (up, down), discarded, _ = cut_to_rank(factors, 2)
    singular = torch.linalg.svdvals(product)
    assert discarded.item() == pytest.approx(singular[2:].square().sum().item())
    assert (product - up.double() @ down.double()).square().sum().item() == pytest.approx(discarded.item(), rel=1e-5)


def test_no_update_stays_none():
    (up, down), discarded, total = cut_to_rank(Factors(torch.zeros(4, 6), torch.zeros(6, 5)), 3)
    assert not up.any()
    assert not down.any()
    assert discarded == total == 0
