import math

import numpy as np
import pytest
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from falign.metrics.calibration import (
    ReliabilityBin,
    brier_score,
    calibration,
    expected_calibration_error,
    probabilities,
    reliability_curve,
    sided,
)


def pairs(n=500, seed=0, scale=2.0, truth=0.6):
    """Margins, and labels that a calibrated reward would predict with ``truth`` times the margins."""
    generator = np.random.default_rng(seed)
    margins = generator.normal(scale=scale, size=n)
    return margins, (generator.random(n) < expit(truth * margins)).astype(float)


def test_probabilities_are_the_logistic_function_even_far_out():
    margins = np.array([-800.0, -3.0, 0.0, 0.5, 800.0])
    assert probabilities(margins) == pytest.approx(expit(margins), rel=1e-12)


@pytest.mark.parametrize("num_bins", [1, 5, 12])
@pytest.mark.parametrize(("binning", "strategy"), [("equal_width", "uniform"), ("equal_mass", "quantile")])
def test_curve_of_an_event_is_that_of_scikit_learn(num_bins, binning, strategy):
    margins, labels = pairs()
    bins = reliability_curve(expit(margins), labels, num_bins=num_bins, binning=binning, lowest=0.0)
    accuracy, confidence = calibration_curve(labels, expit(margins), n_bins=num_bins, strategy=strategy)
    assert [b.accuracy for b in bins] == pytest.approx(list(accuracy))
    assert [b.confidence for b in bins] == pytest.approx(list(confidence))
    assert sum(b.count for b in bins) == len(margins)


@pytest.mark.parametrize("binning", ["equal_width", "equal_mass"])
def test_curve_of_pairs_is_that_of_scikit_learn_on_confidences(binning):
    margins, labels = pairs()
    confidence, right = expit(np.abs(margins)), (margins > 0) == (labels == 1)
    # Ten bins from ½ to 1 are the upper ten of twenty from 0 to 1.
    strategy, n_bins = {"equal_width": ("uniform", 20), "equal_mass": ("quantile", 10)}[binning]
    accuracies, confidences = calibration_curve(right, confidence, n_bins=n_bins, strategy=strategy)
    bins = calibration(margins, labels, binning=binning).bins
    assert [b.accuracy for b in bins] == pytest.approx(list(accuracies))
    assert [b.confidence for b in bins] == pytest.approx(list(confidences))


def test_brier_score_is_that_of_scikit_learn():
    margins, labels = pairs()
    assert calibration(margins, labels).brier == pytest.approx(brier_score_loss(labels, expit(margins)), rel=1e-12)


def test_nothing_depends_on_which_one_is_named_first():
    margins, labels = pairs()
    flip = np.random.default_rng(1).random(len(margins)) < 0.5
    flipped = calibration(np.where(flip, -margins, margins), np.where(flip, 1 - labels, labels))
    whole = calibration(margins, labels)
    assert flipped.ece == pytest.approx(whole.ece, rel=1e-12)
    assert flipped.brier == pytest.approx(whole.brier, rel=1e-12)
    # As chosen and rejected, without labels.
    assert calibration(np.where(labels == 1, margins, -margins)).ece == pytest.approx(whole.ece, rel=1e-12)


@pytest.mark.parametrize("binning", ["equal_width", "equal_mass"])
def test_error_of_a_reward_of_twice_the_scale_is_its_closed_form(binning):
    # Margins ±2 and ±4 where ±1 and ±2 would be right, with labels at exactly the right rate.
    margins = np.array([2.0, 4.0])
    ece = calibration(np.repeat(margins, 2), [1, 1, 1, 1], num_bins=50, binning=binning)
    assert ece.ece == pytest.approx(np.mean(1 - expit(margins)))
    soft = calibration(margins, expit(margins / 2), num_bins=50, binning=binning)
    assert soft.ece == pytest.approx(np.mean(expit(margins) - expit(margins / 2)))
    exact = calibration(margins, expit(margins), num_bins=50)
    assert exact.ece == pytest.approx(0.0, abs=1e-12)
    assert exact.brier == pytest.approx(0.0, abs=1e-12)


def test_a_calibrated_reward_has_a_small_error_and_the_brier_score_of_its_variance():
    margins, labels = pairs(n=200_000, truth=1.0)
    summary = calibration(margins, labels)
    assert summary.ece < 0.005
    assert summary.brier == pytest.approx(np.mean(expit(margins) * expit(-margins)), abs=0.002)


def test_at_the_reference_nothing_is_known():
    summary = calibration([0.0, -0.0, 0.0])
    assert summary == (0.0, 0.25, (ReliabilityBin(0.5, 0.5, 3),))


def test_a_certain_prediction_is_in_the_last_bin():
    (last,) = calibration([1000.0], [1]).bins
    assert (last.confidence, last.count) == (1.0, 1)


def test_equal_confidences_stay_in_one_bin():
    bins = reliability_curve([0.6] * 7 + [0.9], [1.0] * 8, num_bins=4, binning="equal_mass")
    assert [b.count for b in bins] == [7, 1]


def test_error_weighs_bins_by_their_counts():
    bins = [ReliabilityBin(0.6, 0.5, 3), ReliabilityBin(0.9, 1.0, 1)]
    assert expected_calibration_error(bins) == pytest.approx((3 * 0.1 + 0.1) / 4)


def test_sides_at_one_half_are_half_right():
    confidence, right = sided(np.array([0.5, 0.2, 0.7]), np.array([1.0, 0.25, 0.25]))
    assert confidence.tolist() == [0.5, 0.8, 0.7]
    assert right.tolist() == [0.5, 0.75, 0.25]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration([]), r"probability has shape \(0,\); it must be a list of one or more"),
        (lambda: calibration([1.0, math.nan]), r"margins\[1\] is nan; leave out pairs"),
        (lambda: calibration([1.0, 2.0], [1]), "2 predictions but 1 labels"),
        (lambda: calibration([1.0], [-1]), r"label\[0\] is -1.0; it must lie between 0 and 1"),
        (lambda: calibration([1.0], num_bins=0), "num_bins=0 must be 1 or more"),
        (lambda: brier_score([1.5], [1]), r"probability\[0\] is 1.5"),
        (lambda: reliability_curve([0.4], [1]), r"confidence\[0\] is 0.4; it must lie between 0.5 and 1"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
