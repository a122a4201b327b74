import pytest
import torch

from falign.objectives import Vocabulary, block_of, get_measure
from falign.objectives.sinkhorn import Sinkhorn
from tests.scoring.measure_world import assert_exact


def published(p, q, epsilon, iterations, *, constant=False):
    """Row sums of ``P D``, in probabilities and without log space."""
    distance = (p[:, None] - q[None]).abs().sum(-1)
    plan = torch.exp(-(distance.detach() if constant else distance) / epsilon)
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * distance).sum(1)


@pytest.mark.parametrize("plan", ["differentiated", "constant"])
@pytest.mark.parametrize("block", [2, 4, 9, 30])
@pytest.mark.parametrize("trained_head", [False, True])
def test_it_is_the_published_loss_of_each_block(trained_head, block, plan):
    def formula(whole):
        pairs = zip(whole.p(2.0).split(block), whole.q("teacher", 2.0).split(block), strict=True)
        return torch.cat([published(p, q, 0.3, 5, constant=plan == "constant") for p, q in pairs])

    measure = Sinkhorn(block, "teacher", epsilon=0.3, iterations=5, temperature=2.0, plan=plan)
    assert_exact(measure, formula, trained_head=trained_head, padded=True)


def at(positions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(positions, 7, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    return Vocabulary(p, torch.zeros(positions, dtype=torch.long), {"reference": q})


def test_one_position_is_twice_the_total_variation():
    place = at(1)
    torch.testing.assert_close(
        Sinkhorn(2)(place), (place.logprobs.exp() - place.reference().exp()).abs().sum(-1), rtol=1e-12, atol=0
    )


def test_columns_sum_to_one_and_rows_in_the_limit():
    """With all costs 1, the value of a row is its sum in the plan."""
    p, q = torch.eye(6, dtype=torch.float64)[:3], torch.eye(6, dtype=torch.float64)[3:]
    place = Vocabulary(p.clamp(min=1e-300).log(), torch.zeros(3, dtype=torch.long), {"reference": q.log()})
    torch.testing.assert_close(Sinkhorn(3)(place), torch.full((3,), 2.0, dtype=torch.float64))
    place = at(5)
    few, many = (Sinkhorn(5, iterations=n)(place) for n in (1, 2000))
    assert not torch.allclose(few, many, rtol=1e-3)


def test_a_small_epsilon_does_not_underflow():
    place = at(5)
    value = Sinkhorn(5, epsilon=1e-4)(place)
    assert value.isfinite().all()
    assert (value > 0).all()


def test_names_and_refusals():
    assert get_measure("sinkhorn(16, teacher, epsilon=0.2)") == Sinkhorn(16, "teacher", 0.2)
    assert block_of(Sinkhorn(16)) == 16
    for wrong, message in (
        (lambda: Sinkhorn(1), "block=1 must be at least 2 positions"),
        (lambda: Sinkhorn(4, iterations=0), "iterations=0 must be at least 1"),
        (lambda: Sinkhorn(4, epsilon=0.0), "epsilon=0.0 must be positive and finite"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
