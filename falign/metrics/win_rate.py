"""Win rates of two models, and Bradley–Terry strengths of many from pairwise comparisons. A tie counts half."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np
from typing_extensions import override

from falign.metrics.intervals import Interval, Intervals, normal_quantile, wilson
from falign.metrics.numbers import Array, Numbers, float_array

__all__ = ["BradleyTerry", "Comparison", "WinRate", "bradley_terry", "win_rate"]


FEW_TIES = 4  # number of comparisons from which ties narrow the interval; z² of a 95% interval
NEWTON_STEPS = 100


class Comparison(NamedTuple):
    """Two models on one prompt; the outcome is that of the first: 1 won, ½ tied, 0 lost."""

    first: str
    second: str
    outcome: float | int


@dataclass(frozen=True)
class BradleyTerry:
    """Strengths θ with ``P(i beats j) = σ(θ_i - θ_j)``, their mean 0.

    Attributes:
        models: In order of first appearance.
        strengths: θ of each, nats.
        covariance: Covariance of the estimates, [M, M].
    """

    models: tuple[str, ...]
    strengths: Array
    covariance: Array

    def intervals(self, level: float = 0.95) -> Intervals:
        """Return the strengths with the intervals of their normal approximation."""
        half = normal_quantile(level) * np.sqrt(np.diag(self.covariance).clip(min=0.0))
        return Intervals(self.strengths, self.strengths - half, self.strengths + half)

    def win_probability(self, first: str, second: str, level: float = 0.95) -> Interval:
        """Return the probability that the first model beats the second, compared or not, with its interval.

        Raises:
            ValueError: A model is not one of these.
        """
        for model in (first, second):
            if model not in self.models:
                raise ValueError(f"{model!r} was not compared; the models are {', '.join(map(repr, self.models))}.")
        contrast = np.zeros(len(self.models))
        contrast[self.models.index(first)] += 1
        contrast[self.models.index(second)] -= 1
        difference = float(contrast @ self.strengths)
        half = normal_quantile(level) * float(np.sqrt(max(contrast @ self.covariance @ contrast, 0.0)))
        return Interval(_sigmoid(difference), _sigmoid(difference - half), _sigmoid(difference + half))


def win_rate(outcomes: Numbers, *, level: float = 0.95) -> Interval:
    """Return the share of comparisons that are won, ties counting one half, with Wilson's interval.

    Args:
        outcomes: 1, ½ or 0 of each comparison.
        level: Of the interval.

    Returns:
        The rate and its interval, which ties make narrower.

    Raises:
        ValueError: There are no comparisons, or an outcome is not one of the three.

    Example:
        >>> value, low, high = win_rate([1.0] * 6 + [0.5] * 2 + [0.0] * 2)
        >>> print(f"{value:.2f} ({low:.2f} to {high:.2f})")
        0.70 (0.42 to 0.87)
    """
    results = float_array(outcomes, "outcomes").tolist()
    if not results:
        raise ValueError("There are no outcomes; a win rate needs one or more comparisons.")
    for i, outcome in enumerate(results):
        _check_outcome(outcome, f"outcomes[{i}]")
    return wilson(math.fsum(results), len(results), ties=results.count(0.5), level=level)


def bradley_terry(
    comparisons: Sequence[Comparison] | Sequence[tuple[str, str, float | int]], *, prior: float | int = 0
) -> BradleyTerry:
    """Return the strengths that make the comparisons most likely, a tie counting half won, half lost.

    The covariance is the sandwich ``L⁺ S L⁺``, with ``L = Σ p (1 - p) (e_i - e_j)(e_i - e_j)ᵀ`` and S the same sum of
    ``(outcome - p)²``, so that ties, which vary less than wins and losses, narrow the intervals. As in
    :func:`falign.metrics.wilson`, a few ties do not. The comparisons are taken as independent; for several on each
    prompt, resample prompts with :func:`falign.metrics.bootstrap`.

    Args:
        comparisons: Each compares two models.
        prior: Number of ties added between every two models, so that a model that always wins has a finite strength.

    Returns:
        The strengths, of mean 0, with their covariance.

    Raises:
        ValueError: There are no comparisons, one is of a model with itself, an outcome is not 1, ½ or 0, or the
            comparisons leave a strength infinite.

    Source:
        Bradley and Terry (1952); Ford (1957) for when the maximum exists; White (1982) for the sandwich.

    Example:
        >>> fit = bradley_terry([("a", "b", 1.0), ("a", "b", 1.0), ("a", "b", 1.0), ("a", "b", 0.0)])
        >>> print(f"{fit.strengths[0] - fit.strengths[1]:.4f} {fit.win_probability('a', 'b').value:.2f}")  # log 3
        1.0986 0.75
    """
    wins, ties, models = _counts(comparisons, prior)
    won = wins + ties / 2
    _check_connected(won, models)
    strengths, games = np.zeros(len(models)), won + won.T
    for _ in range(NEWTON_STEPS):
        p = _probabilities(strengths)
        gradient = (won - games * p).sum(axis=1)
        if np.abs(gradient).max() <= 1e-10 * games.sum():
            break
        # The likelihood does not change if all strengths shift together, so the Hessian is singular: use its
        # pseudo-inverse.
        step = np.linalg.pinv(_laplacian(games * p * (1 - p)), hermitian=True) @ gradient
        # If p is near 0 or 1 the likelihood is almost linear, and a full Newton step overshoots: bound it.
        strengths = strengths + step * min(1.0, 2.0 / np.abs(step).max())
    p = _probabilities(strengths)
    # The rest of the ties count as half wins and half losses, with the larger variance.
    believed = ties * games / (games + FEW_TIES)
    square = (wins + (ties - believed) / 2) * (1 - p) ** 2 + believed / 2 * (0.5 - p) ** 2
    inverse = np.linalg.pinv(_laplacian(games * p * (1 - p)), hermitian=True)
    return BradleyTerry(models, strengths - strengths.mean(), inverse @ _laplacian(square + square.T) @ inverse)


class WinRate(evaluate.Metric):
    """:func:`bradley_terry` and each model's :func:`win_rate` from first models (predictions) against second ones."""

    @override
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="Bradley and Terry (1952), Rank Analysis of Incomplete Block Designs",
            inputs_description="predictions, references: the names of the first and the second model of each "
            "comparison. outcomes: 1 where the first won, 0.5 at a tie, 0 where it lost.",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                    "outcomes": datasets.Value("float64"),
                }
            ),
        )

    @override
    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]: called with the features by name
        self,
        *,
        predictions: list[str],
        references: list[str],
        outcomes: list[float],
        prior: float | int = 0,
        level: float = 0.95,
    ) -> dict[str, Any]:
        comparisons = list(map(Comparison, predictions, references, outcomes))
        fit = bradley_terry(comparisons, prior=prior)
        strengths = fit.intervals(level)
        rows = []
        for i in np.argsort(-fit.strengths, kind="stable"):
            model = fit.models[i]
            own = [c.outcome for c in comparisons if c.first == model]
            own += [1 - c.outcome for c in comparisons if c.second == model]
            strength = Interval(*(float(end[i]) for end in strengths))
            rows.append(
                {
                    "model": model,
                    "comparisons": len(own),
                    **win_rate(own, level=level).entries("win_rate"),
                    **strength.entries("strength"),
                }
            )
        return {"models": rows}


def _sigmoid(x: float) -> float:
    return float(np.exp(-np.logaddexp(0.0, -x)))


def _probabilities(strengths: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, strengths[None, :] - strengths[:, None]))


def _laplacian(weights: Array) -> Array:
    return np.diag(weights.sum(axis=1)) - weights


def _check_outcome(outcome: float | int, place: str) -> None:
    if outcome not in (0.0, 0.5, 1.0):
        raise ValueError(f"{place} is {outcome!r}; an outcome is 1 (won), 0.5 (tied) or 0 (lost).")


def _counts(
    comparisons: Sequence[tuple[str, str, float | int]], prior: float | int
) -> tuple[Array, Array, tuple[str, ...]]:
    """``wins[i, j]``: how often i beat j; ``ties[i, j]``, symmetric; and the models."""
    if not prior >= 0:
        raise ValueError(f"prior={prior} must be 0 or more ties between every two models.")
    if len(comparisons) == 0:
        raise ValueError("There are no comparisons; give one or more of two models each.")
    number: dict[str, int] = {}
    for first, second, _ in comparisons:
        number.setdefault(first, len(number))
        number.setdefault(second, len(number))
    wins = np.zeros((len(number), len(number)))
    ties = prior * (1 - np.eye(len(number)))
    for i, (first, second, outcome) in enumerate(comparisons):
        _check_outcome(outcome, f"The outcome of comparisons[{i}]")
        if first == second:
            raise ValueError(f"comparisons[{i}] is of {first!r} with itself; compare two models.")
        a, b = number[first], number[second]
        if outcome == 0.5:
            ties[a, b] += 1
            ties[b, a] += 1
        else:
            wins[(a, b) if outcome else (b, a)] += 1
    return wins, ties, tuple(number)


def _check_connected(won: Array, models: tuple[str, ...]) -> None:
    """Strengths are finite if and only if each model beats or ties every other one, directly or through others."""
    reaches = (won > 0) | np.eye(len(models), dtype=bool)
    for _ in models:
        reaches = reaches @ reaches
    if reaches.all():
        return
    i, j = map(int, np.argwhere(~reaches)[0])
    raise ValueError(
        f"{models[i]!r} beats or ties {models[j]!r} neither directly nor through others, so that their strengths are "
        "infinitely far apart: compare them more often, leave one out, or give prior=1."
    )
