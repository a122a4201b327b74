import math

import numpy as np
import pytest

from falign.metrics import wilson
from falign.metrics.win_rate import Comparison, bradley_terry, win_rate


def logistic(x):
    return 1 / (1 + np.exp(-x))


def play(strengths, games, generator, tie=0.0):
    """Every two models play; ``tie`` of the games of equals are tied, and fewer of others."""
    names = "abcdefgh"[: len(strengths)]
    comparisons = []
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            p = logistic(strengths[i] - strengths[j])
            tied = 4 * p * (1 - p) * tie
            law = [p - tied / 2, tied, 1 - p - tied / 2]
            for outcome in generator.choice([1.0, 0.5, 0.0], size=games, p=law):
                comparisons.append((first, names[j], float(outcome)))
    return comparisons


def test_win_rate_counts_ties_half():
    assert win_rate([1, 1, 0.5, 0.5, 0]).value == 3 / 5
    assert win_rate([1, 0, 1]) == wilson(2, 3)


def test_ties_narrow_the_interval_and_few_ties_do_not():
    decided, tied = win_rate([1, 0] * 100), win_rate([1, 0] * 10 + [0.5] * 180)
    assert tied.high - tied.low == pytest.approx(math.sqrt(0.1) * (decided.high - decided.low), rel=0.15)
    three = win_rate([0.5] * 3)
    assert three.low < 0.3 < 0.7 < three.high


@pytest.mark.parametrize(("rate", "tie"), [(0.5, 0.0), (0.6, 0.4), (0.85, 0.2), (0.5, 0.8)])
def test_win_rate_covers_at_its_level(rate, tie):
    generator = np.random.default_rng(0)
    law = [rate - tie / 2, tie, 1 - rate - tie / 2]
    draws = generator.choice([1.0, 0.5, 0.0], size=(1000, 60), p=law)
    covered = [low <= rate <= high for _, low, high in map(win_rate, draws)]
    assert 0.93 <= np.mean(covered) <= 0.985  # above the level where most are ties, of which some are not believed


def test_two_models_have_the_log_odds_of_their_win_rate():
    fit = bradley_terry([("a", "b", 1.0)] * 7 + [("b", "a", 1.0)] * 2 + [("b", "a", 0.5)] * 2)
    assert fit.models == ("a", "b")
    assert fit.strengths == pytest.approx(np.array([1, -1]) * math.log(8 / 3) / 2)
    assert fit.win_probability("a", "b").value == pytest.approx(8 / 11)
    assert fit.win_probability("b", "a").low == pytest.approx(1 - fit.win_probability("a", "b").high)
    assert fit.win_probability("a", "a") == (0.5, 0.5, 0.5)


def test_variance_of_two_models_without_ties_is_that_of_the_log_odds():
    fit = bradley_terry([("a", "b", 1.0)] * 30 + [("a", "b", 0.0)] * 10)
    contrast = np.array([1.0, -1.0])
    assert contrast @ fit.covariance @ contrast == pytest.approx(1 / 30 + 1 / 10)


def test_strengths_solve_the_likelihood_equations():
    comparisons = play([1.5, 0.0, -0.5, -2.0], 40, np.random.default_rng(1), tie=0.1)
    fit = bradley_terry(comparisons)
    assert fit.strengths.sum() == pytest.approx(0.0, abs=1e-12)
    theta = dict(zip(fit.models, fit.strengths, strict=True))
    for model in fit.models:
        won = sum(o for a, _, o in comparisons if a == model) + sum(1 - o for _, b, o in comparisons if b == model)
        others = [b if a == model else a for a, b, _ in comparisons if model in (a, b)]
        assert sum(logistic(theta[model] - theta[other]) for other in others) == pytest.approx(won, rel=1e-8)


def test_models_far_apart_are_fitted_too():
    comparisons = [("a", "b", 1.0)] * 9_999 + [("a", "b", 0.0)] + [("b", "c", 1.0)] * 9_999 + [("b", "c", 0.0)]
    fit = bradley_terry(comparisons)
    assert fit.strengths == pytest.approx(np.array([1, 0, -1]) * math.log(9_999), rel=1e-6, abs=1e-6)
    assert fit.win_probability("a", "c").value > 1 - 2e-8  # never compared


def test_order_of_names_does_not_matter():
    comparisons = play([0.5, 0.0, -1.0], 20, np.random.default_rng(2), tie=0.2)
    turned = [(b, a, 1 - outcome) for a, b, outcome in reversed(comparisons)]
    fit, other = bradley_terry(comparisons), bradley_terry(turned)
    order = [other.models.index(model) for model in fit.models]
    assert other.strengths[order] == pytest.approx(fit.strengths)
    assert other.covariance[np.ix_(order, order)] == pytest.approx(fit.covariance)


@pytest.mark.parametrize("tie", [0.0, 0.25])
def test_bradley_terry_covers_at_its_level(tie):
    generator, strengths = np.random.default_rng(3), np.array([0.8, 0.2, -0.1, -0.9])
    covered, probability, trials = 0, 0, 200
    truth = logistic(strengths[0] - strengths[3])
    for _ in range(trials):
        fit = bradley_terry(play(strengths, 40, generator, tie=tie))
        _, low, high = fit.intervals(0.9)
        covered += ((low <= strengths) & (strengths <= high)).sum()
        _, below, above = fit.win_probability("a", "d", 0.9)
        probability += below <= truth <= above
    assert covered / (4 * trials) == pytest.approx(0.9, abs=0.03)
    assert probability / trials == pytest.approx(0.9, abs=0.064)


def test_a_prior_makes_an_undefeated_model_finite():
    comparisons = [Comparison("a", "b", 1), Comparison("a", "b", 1)]
    fit = bradley_terry(comparisons, prior=1)
    assert fit.win_probability("a", "b").value == pytest.approx(2.5 / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: win_rate([]), "There are no outcomes"),
        (lambda: win_rate([1, 0.7]), r"outcomes\[1\] is 0.7; an outcome is 1 \(won\), 0.5 \(tied\) or 0 \(lost\)"),
        (lambda: bradley_terry([]), "There are no comparisons"),
        (lambda: bradley_terry([("a", "b", 0.5), ("a", "a", 1)]), r"comparisons\[1\] is of 'a' with itself"),
        (lambda: bradley_terry([("a", "b", 2)]), r"outcome of comparisons\[0\] is 2"),
        (lambda: bradley_terry([("a", "b", 0.5)], prior=-1), "prior=-1 must be 0 or more"),
        (lambda: bradley_terry([("a", "b", 1)]), "'b' beats or ties 'a' neither directly nor through others"),
        (lambda: bradley_terry([("a", "b", 0.5), ("c", "d", 0.5)]), "'a' beats or ties 'c' neither"),
        (lambda: bradley_terry([("a", "b", 0.5)]).win_probability("a", "c"), "'c' was not compared; the models are"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
