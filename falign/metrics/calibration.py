"""Calibration of rewards as probabilities: does a margin m mean that the first of a pair wins with probability σ(m)?

A pair has a first and a second completion, the margin ``m = r(first) - r(second)``, the probability ``p = σ(m)`` that
the first is preferred, and the label y: 1 if it is, 0 if not, a share if several people judged. Which one is named
first is a convention, so that nothing here depends on it: bins are of the confidence ``c = max(p, 1 - p)``, from ½ to
1, and what is compared with it is how often the more probable one was the preferred one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import datasets
import evaluate
import numpy as np
from typing_extensions import override

from falign.metrics.numbers import Array, Numbers, float_array

__all__ = [
    "Binning",
    "Calibration",
    "CalibrationSummary",
    "ReliabilityBin",
    "brier_score",
    "calibration",
    "expected_calibration_error",
    "probabilities",
    "reliability_curve",
    "sided",
]

Binning = Literal["equal_width", "equal_mass"]


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions of similar confidence: mean confidence, share of correct ones, and their number."""

    confidence: float
    accuracy: float
    count: int


class CalibrationSummary(NamedTuple):
    """Expected calibration error, Brier score, and the reliability curve behind the former."""

    ece: float
    brier: float
    bins: tuple[ReliabilityBin, ...]


def probabilities(margins: Numbers) -> Array:
    """Return σ(m): the probability that the first is preferred, by Bradley and Terry."""
    return np.exp(-np.logaddexp(0.0, -float_array(margins, "margins")))


def sided(probability: Array, label: Array) -> tuple[Array, Array]:
    """Return the confidence ``max(p, 1 - p)``, and the correctness of the more probable side: y, 1 - y, or ½."""
    side = np.sign(probability - 0.5)
    return np.maximum(probability, 1 - probability), 0.5 + side * (label - 0.5)


def reliability_curve(
    confidence: Numbers,
    right: Numbers,
    *,
    num_bins: int = 10,
    binning: Binning = "equal_width",
    lowest: float = 0.5,
) -> tuple[ReliabilityBin, ...]:
    """Return the mean confidence and the share of correct predictions in each bin of confidence.

    Args:
        confidence: From ``lowest`` to 1.
        right: Correctness of each prediction, from 0 to 1.
        num_bins: B.
        binning: ``"equal_width"``: edges ``lowest + (1 - lowest) i/B``; ``"equal_mass"``: the quantiles i/B of the
            confidences. A bin has its upper edge, the first one its lower edge too; equal confidences stay together.
        lowest: Least possible confidence: ½ of two sides, 0 if the "confidence" is the probability of one event.

    Returns:
        The bins that are not empty, in rising order.

    Raises:
        ValueError: There are no values, different numbers of both, or values out of range; or the binning is unknown.

    Example:
        >>> reliability_curve([0.5, 0.875, 0.9375, 1.0], [0.0, 1.0, 1.0, 0.5], num_bins=2)[1]
        ReliabilityBin(confidence=0.9375, accuracy=0.8333333333333334, count=3)
    """
    confidence, right = float_array(confidence, "confidence"), float_array(right, "right")
    _check(confidence, "confidence", low=lowest)
    _check(right, "right")
    _check_lengths(confidence, right)
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins} must be 1 or more; 10 is usual.")
    if binning == "equal_width":
        inner = np.linspace(lowest, 1.0, num_bins + 1)[1:-1]
    elif binning == "equal_mass":
        inner = np.quantile(confidence, np.linspace(0.0, 1.0, num_bins + 1))[1:-1]
    else:
        raise ValueError(f"binning={binning!r}: choose 'equal_width' or 'equal_mass'.")
    # side="left" puts a confidence on an inner edge into the bin below, whose upper edge it is.
    bin_of = np.searchsorted(inner, confidence, side="left")
    members = [bin_of == i for i in range(num_bins)]
    return tuple(
        ReliabilityBin(float(confidence[those].mean()), float(right[those].mean()), int(those.sum()))
        for those in members
        if those.any()
    )


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return ``Σ_b n_b/n |accuracy_b - confidence_b|``.

    Source:
        Naeini et al. (AAAI 2015); Guo et al. (arXiv:1706.04599), Eq. 3.
    """
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / sum(b.count for b in bins)


def brier_score(probability: Numbers, label: Numbers) -> float:
    """Return the mean of ``(p - y)²``; swapping the two completions of a pair does not change it.

    Source:
        Brier (1950), Verification of forecasts expressed in terms of probability.

    Example:
        >>> brier_score([0.5, 0.8], [1.0, 1.0])
        0.145
    """
    p, y = float_array(probability, "probability"), float_array(label, "label")
    _check(p, "probability")
    _check(y, "label")
    _check_lengths(p, y)
    return float(((p - y) ** 2).mean())


def calibration(
    margins: Numbers,
    labels: Numbers | None = None,
    *,
    num_bins: int = 10,
    binning: Binning = "equal_width",
) -> CalibrationSummary:
    """Return the calibration of σ(margin) as the probability that the first completion is preferred.

    Args:
        margins: ``r(first) - r(second)`` of each pair, nats: for an implicit reward β (f'(u_first) - f'(u_second)).
        labels: 1 if the first is preferred, 0 if the second is, or a share between; default: 1 everywhere, for margins
            of chosen minus rejected.
        num_bins: Number of bins of the confidence ``max(p, 1 - p)``, from ½ to 1.
        binning: See :func:`reliability_curve`.

    Returns:
        The expected calibration error, the Brier score and the curve.

    Raises:
        ValueError: A margin is NaN, a label is not between 0 and 1, or their numbers differ.

    Example:
        >>> summary = calibration([0.0, 2.0, 2.0, -2.0])  # confidences 0.5 and three times 0.88, two of them right
        >>> print(f"{summary.ece:.3f} {summary.brier:.3f}")
        0.161 0.264
    """
    margins = float_array(margins, "margins")
    labels = np.ones_like(margins) if labels is None else float_array(labels, "labels")
    if np.isnan(margins).any():
        raise ValueError(f"margins[{int(np.isnan(margins).argmax())}] is nan; leave out pairs without rewards.")
    probability = probabilities(margins)
    brier = brier_score(probability, labels)
    bins = reliability_curve(*sided(probability, labels), num_bins=num_bins, binning=binning)
    return CalibrationSummary(expected_calibration_error(bins), brier, bins)


class Calibration(evaluate.Metric):
    """:func:`calibration` of margins (predictions) against labels of preference (references)."""

    @override
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions: for each pair, the reward of the first minus that of the second. "
            "references: 1 where the first is preferred, 0 where the second is.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    @override
    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]: called with the features by name
        self,
        *,
        predictions: list[float],
        references: list[float],
        num_bins: int = 10,
        binning: Binning = "equal_width",
    ) -> dict[str, Any]:
        summary = calibration(predictions, references, num_bins=num_bins, binning=binning)
        return {"ece": summary.ece, "brier": summary.brier, "bins": [asdict(b) for b in summary.bins]}


def _check(values: Array, name: str, *, low: float = 0.0) -> None:
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} has shape {values.shape}; it must be a list of one or more numbers.")
    wrong = ~((values >= low) & (values <= 1.0))
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(f"{name}[{i}] is {values[i]}; it must lie between {low:g} and 1.")


def _check_lengths(first: Array, second: Array) -> None:
    if len(first) != len(second):
        raise ValueError(f"There are {len(first)} predictions but {len(second)} labels; give one each per pair.")
