import math

import torch

from falign.training.processes import Means


def test_means_weigh_items_and_not_batches():
    means = Means()
    means.add({"a": torch.tensor([1.0, 2.0, 3.0])})
    means.add({"a": torch.tensor([10.0]), "b": torch.tensor([0.5])})
    assert means.take() == {"a": 4.0, "b": 0.5}
    assert means.take() == {}


def test_a_value_that_is_not_finite_is_not_hidden():
    means = Means()
    means.add({"a": torch.tensor([1.0, math.inf])})
    assert means.take() == {"a": math.inf}
