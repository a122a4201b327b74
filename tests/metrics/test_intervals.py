import math

import numpy as np
import pytest

from falign.metrics import Interval, bootstrap, wilson
from falign.metrics.intervals import normal_quantile


def mean_of(values):
    values = np.asarray(values, dtype=np.float64)
    return lambda index: float(values[index].mean())


def test_bootstrap_interval_of_a_mean_is_the_normal_one_for_many_samples():
    values = np.random.default_rng(1).exponential(size=2000)
    value, low, high = bootstrap(mean_of(values), values, num_resamples=2000)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert value == values.mean()
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.1 * half)


def test_bootstrap_covers_at_its_level():
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        interval = bootstrap(mean_of(generator.gamma(2.0, size=80)), 80, num_resamples=200, level=0.9, seed=trial)
        covered += interval.low <= 2.0 <= interval.high
    assert covered / 200 == pytest.approx(0.9, abs=0.065)  # three standard deviations


def test_strata_keep_their_sizes_and_their_places():
    strata = ["a"] * 5 + ["b"] * 3 + ["a"] * 2
    seen = []

    def statistic(index):
        seen.append([strata[i] for i in index])
        return 0.0

    bootstrap(statistic, 10, strata=strata, num_resamples=50)
    assert all(row == strata for row in seen)


def test_every_member_of_a_stratum_is_drawn_equally_often():
    counts = np.zeros(6)

    def statistic(index):
        counts[:] += np.bincount(index, minlength=6)
        return 0.0

    bootstrap(statistic, 6, strata=[0, 1, 0, 1, 0, 1], num_resamples=5000)
    assert counts == pytest.approx(np.full(6, 5001), rel=0.03)


def test_spread_between_strata_is_no_uncertainty():
    values = [0.0] * 10 + [1.0] * 10
    assert bootstrap(mean_of(values), values, strata=values) == (0.5, 0.5, 0.5)
    assert bootstrap(mean_of(values), values).low < 0.4


def test_an_array_statistic_has_an_interval_for_each_entry():
    values = np.random.default_rng(3).normal(size=(50, 2))
    both = bootstrap(lambda index: values[index].mean(axis=0), values, seed=7)
    for i in range(2):
        one = bootstrap(mean_of(values[:, i]), 50, seed=7)
        assert (both.value[i], both.low[i], both.high[i]) == pytest.approx(tuple(one))


def test_equal_seeds_give_equal_intervals():
    values = np.arange(30.0)
    assert bootstrap(mean_of(values), values, seed=5) == bootstrap(mean_of(values), values, seed=5)
    assert bootstrap(mean_of(values), values, seed=5) != bootstrap(mean_of(values), values, seed=6)


def test_wilson_ends_solve_the_score_equation():
    share, low, high = wilson(7, 20, level=0.9)
    assert share == 0.35
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(normal_quantile(0.9) ** 2 * end * (1 - end) / 20)


def test_wilson_with_ties_solves_its_equation():
    z2 = normal_quantile(0.95) ** 2
    share, low, high = wilson(20, 30, ties=12)
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(z2 / 30 * (end * (1 - end) - 12 / (30 + z2) / 4))


def test_wilson_at_the_ends():
    z = normal_quantile(0.95)
    assert wilson(0, 10) == (0.0, 0.0, pytest.approx(z**2 / (10 + z**2)))
    assert wilson(10, 10) == (1.0, pytest.approx(10 / (10 + z**2)), 1.0)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_wilson_covers_at_its_level(share):
    # Exactly, by the binomial law: the mean over n smooths what its steps do.
    coverage = []
    for n in range(30, 60):
        inside = [k for k in range(n + 1) if wilson(k, n).low <= share <= wilson(k, n).high]
        coverage.append(sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in inside))
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.012)


def test_an_interval_reads_as_its_three_numbers():
    assert Interval(0.5, 0.4, 0.6)._asdict() == {"value": 0.5, "low": 0.4, "high": 0.6}
    assert Interval(0.5, 0.4, 0.6).entries("ece") == {"ece": 0.5, "ece_low": 0.4, "ece_high": 0.6}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap(lambda _: 0.0, []), "samples=0: a statistic needs one or more"),
        (lambda: bootstrap(lambda _: 0.0, 3, strata=["a"]), "strata has 1 entries for 3 samples"),
        (lambda: bootstrap(lambda _: 0.0, 3, num_resamples=0), "num_resamples=0 must be 1 or more"),
        (lambda: bootstrap(lambda _: 0.0, 3, level=95.0), "level=95.0 must lie between 0 and 1"),
        (lambda: bootstrap(lambda _: math.nan, 3), "statistic of the samples is NaN"),
        (lambda: bootstrap(lambda index: math.nan if index[0] else 0.0, 3), "NaN for a resample; give strata"),
        (lambda: wilson(3, 2), "successes=3, total=2"),
        (lambda: wilson(0, 0), "successes=0, total=0"),
        (lambda: wilson(1, 4, ties=3), "ties=3: .* a tie is half a success"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
