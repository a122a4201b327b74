import math

import pytest
import torch

from falign.objectives import BinaryConstraint, ExponentialReward, MomentConstraints, ProductTarget, Target

TARGETS = [BinaryConstraint(), MomentConstraints((1.0, 2.0)), ExponentialReward(0.5)]


def test_scores_are_those_of_the_formulas():
    assert BinaryConstraint().log_score(torch.tensor([[0.0], [1.0]])).tolist() == [-math.inf, 0.0]
    assert MomentConstraints((2.0, -3.0)).log_score(torch.tensor([[1.0, 0.5]])).tolist() == [0.5]
    assert ExponentialReward(0.25).log_score(torch.tensor([[-1.0]])).tolist() == [-4.0]


def test_a_product_takes_the_columns_in_order_and_inherits_zeros():
    product = ProductTarget(tuple(TARGETS))
    assert (product.num_features, product.has_zeros) == (4, True)
    features = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    assert product.log_score(features).tolist() == [2.0 + 6.0 + 8.0, -math.inf]
    assert product.log_score(features).dtype == torch.float64
    assert not ProductTarget(tuple(TARGETS[1:])).has_zeros


@pytest.mark.parametrize("target", [*TARGETS, ProductTarget(tuple(TARGETS))])
def test_all_are_targets_and_refuse_other_numbers_of_features(target):
    assert isinstance(target, Target)
    with pytest.raises((ValueError, TypeError), match="features"):
        target.log_score(torch.zeros(3, target.num_features + 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExponentialReward(0.0), "beta=0.0 must be positive"),
        (lambda: MomentConstraints(()), "one finite number for each feature"),
        (lambda: MomentConstraints((1.0, math.inf)), "one finite number"),
        (lambda: ProductTarget(()), "no factor"),
    ],
)
def test_what_makes_no_target_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
