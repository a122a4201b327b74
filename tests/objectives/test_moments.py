import math

import pytest
import torch

from falign.objectives import fit_moments


def weighted_means(features, lambdas, log_weights=0.0):
    return (features.double() @ lambdas + log_weights).softmax(0) @ features.double()


def test_one_binary_feature_has_the_closed_form():
    features = torch.tensor([0.0] * 70 + [1.0] * 30)[:, None]
    # 0.3 e^λ / (0.7 + 0.3 e^λ) = 0.5
    assert fit_moments(features, [0.5]).item() == pytest.approx(math.log(7 / 3))
    assert fit_moments(features, [0.3]).item() == pytest.approx(0.0, abs=1e-7)
    assert fit_moments(features, [0.999]).item() == pytest.approx(math.log(999 * 7 / 3), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_several_moments_are_reached_whatever_their_units(scale):
    features = torch.randn(500, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = features * torch.tensor([scale, 1.0, 100.0]) + torch.tensor([0.0, 5.0, -scale])
    wanted = features.mean(0) + torch.tensor([0.8, -0.5, 0.6]) * features.std(0)
    lambdas = fit_moments(features, wanted)
    torch.testing.assert_close(
        (weighted_means(features, lambdas) - wanted) / features.std(0), torch.zeros(3).double(), rtol=0, atol=1e-6
    )


def test_samples_of_another_law_count_by_their_weights():
    features = torch.randn(300, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    log_weights = 0.7 * features[:, 0]
    lambdas = fit_moments(features, [0.4, -0.2], log_weights=log_weights)
    torch.testing.assert_close(
        weighted_means(features, lambdas, log_weights), torch.tensor([0.4, -0.2]).double(), rtol=0, atol=1e-7
    )
    plain = fit_moments(features, [0.4, -0.2])
    torch.testing.assert_close(plain, lambdas + torch.tensor([0.7, 0.0]).double(), rtol=0, atol=1e-6)


def test_dependent_features_share_the_work_and_constant_ones_have_none():
    column = torch.randn(100, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    features = torch.cat([column, column, torch.full_like(column, 4.0)], dim=-1)
    lambdas = fit_moments(features, [0.3, 0.3, 4.0])
    assert lambdas[0].item() == pytest.approx(lambdas[1].item())
    assert lambdas[2].item() == 0.0
    torch.testing.assert_close(weighted_means(features, lambdas)[0].item(), 0.3, rtol=0, atol=1e-7)


def test_a_moment_outside_the_samples_is_named():
    features = torch.tensor([[0.0, 1.0], [1.0, 2.0], [0.0, 3.0]])
    with pytest.raises(ValueError, match=r"feature 0 \(wanted 1, samples 0 to 1\) cannot be reached.*BinaryConstraint"):
        fit_moments(features, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"feature 1 \(wanted 3.5, samples 1 to 3\)"):
        fit_moments(features, [0.5, 3.5])
    with pytest.raises(ValueError, match=r"feature 0 \(wanted 0.5, samples 0 to 0\)"):
        fit_moments(torch.zeros(4, 1), [0.5])


def test_moments_that_exclude_each_other_are_named_together():
    """Of two features that never hold at once no weights make both frequent; a third is not to blame."""
    generator = torch.Generator().manual_seed(4)
    kind = torch.randint(3, (400,), generator=generator)
    features = torch.stack([kind == 0, kind == 1, torch.rand(400, generator=generator) < 0.5], dim=-1).double()
    with pytest.raises(ValueError, match=r"feature 0 \(.*\), 1 \(wanted 0.7.*\) together cannot") as caught:
        fit_moments(features, [0.7, 0.7, 0.5])
    assert "2 (wanted" not in str(caught.value)


def test_columns_and_moments_are_counted():
    with pytest.raises((ValueError, TypeError), match="features"):
        fit_moments(torch.zeros(5, 2), [0.5])
