import math

import pytest
import torch

from falign.objectives import IPO, Exo, Robust, hinge, logistic, squared
from falign.objectives.margins import MARGIN_LOSSES, get_margin_loss

MARGINS = torch.tensor([-3.0, -0.5, 0.0, 0.25, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_every_loss_has_the_gradient_of_its_value_and_its_shape(name):
    loss = get_margin_loss(name)
    margin = MARGINS.clone().requires_grad_()
    assert loss(margin).shape == margin.shape
    assert torch.autograd.gradcheck(loss, margin)


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_every_loss_wants_a_larger_margin_at_zero(name):
    margin = torch.zeros(1, requires_grad=True)
    get_margin_loss(name)(margin).backward()
    assert margin.grad.item() < 0


def test_values():
    assert logistic(torch.tensor([-200.0])).item() == 200.0
    assert hinge(MARGINS).tolist() == [4.0, 1.5, 1.0, 0.75, 0.0]
    assert squared(MARGINS).tolist() == [12.25, 1.0, 0.25, 0.0625, 2.25]


def test_robust_is_unbiased_under_flipped_labels():
    noise = 0.2
    robust = Robust(noise)
    mean = (1 - noise) * robust(MARGINS) + noise * robust(-MARGINS)
    torch.testing.assert_close(mean, logistic(MARGINS))


def test_exo_is_zero_where_the_policy_says_what_the_labels_say():
    smoothing = 0.2
    agree = torch.tensor([math.log(0.8 / 0.2)], dtype=torch.float64, requires_grad=True)
    loss = Exo(smoothing)(agree)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-15)
    assert agree.grad.item() == pytest.approx(0.0, abs=1e-15)
    assert (Exo(smoothing)(MARGINS) > 0).all()


def test_aliases_of_the_ecosystem():
    assert get_margin_loss("sigmoid") is logistic
    assert get_margin_loss("exo_pair(0.1)") == Exo(0.1)


def test_ipo_is_that_of_the_paper_and_needs_beta():
    expected = [(margin / 0.2 - 1 / 0.4) ** 2 for margin in MARGINS.tolist()]
    torch.testing.assert_close(IPO(0.2)(MARGINS).tolist(), expected)
    with pytest.raises(
        ValueError, match="needs log-ratios per token and beta: use it as margin_loss of a pairwise objective"
    ):
        get_margin_loss("ipo")
    with pytest.raises(ValueError, match="did you mean 'ipo'"):
        get_margin_loss("ip")
