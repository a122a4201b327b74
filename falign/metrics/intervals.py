"""Confidence intervals: the bootstrap for any statistic, Wilson's for a proportion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from statistics import NormalDist
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from falign.metrics.numbers import Array

__all__ = ["Indices", "Interval", "Intervals", "bootstrap", "normal_quantile", "wilson"]

Indices = NDArray[np.int64]


class Interval(NamedTuple):
    """An estimate between the ends of its confidence interval."""

    value: float
    low: float
    high: float

    def entries(self, name: str) -> dict[str, float]:
        """Return the three under ``name``, ``name_low`` and ``name_high``, as the metrics give them."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


class Intervals(NamedTuple):
    """Several estimates, each between the ends of its confidence interval: arrays of one shape."""

    value: Array
    low: Array
    high: Array


@overload
def bootstrap(
    statistic: Callable[[Indices], float],
    samples: int | Sized,
    *,
    strata: Sequence[object] | None = ...,
    num_resamples: int = ...,
    level: float = ...,
    seed: int = ...,
) -> Interval: ...


@overload
def bootstrap(
    statistic: Callable[[Indices], Array],
    samples: int | Sized,
    *,
    strata: Sequence[object] | None = ...,
    num_resamples: int = ...,
    level: float = ...,
    seed: int = ...,
) -> Intervals: ...


def bootstrap(
    statistic: Callable[[Indices], float] | Callable[[Indices], Array],
    samples: int | Sized,
    *,
    strata: Sequence[object] | None = None,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval | Intervals:
    """Return a statistic of some samples with its percentile interval under resampling with replacement.

    The samples must be independent units: with several completions per prompt, the prompts.

    Args:
        statistic: Takes indices into the samples, shape (n,), and returns a float or an array of floats for these.
        samples: Their number n, or anything of that length.
        strata: The stratum of each sample, such as its subset; a sample is only replaced by one of its own stratum,
            so that each keeps its size, and ``strata[i]`` is also that of the i-th index.
        num_resamples: Number of resamples.
        level: The nominal coverage of the interval.
        seed: Seed of the resampling; equal seeds give equal intervals.

    Returns:
        The statistic of the samples and its interval; for an array, one for each entry.

    Raises:
        ValueError: There are no samples, not one stratum for each, no resamples, a level outside of (0, 1), or a
            statistic that is NaN.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.

    Example:
        >>> correct = np.array([1.0] * 80 + [0.0] * 20)
        >>> value, low, high = bootstrap(lambda index: float(correct[index].mean()), correct)
        >>> print(f"{value:.2f} ({low:.2f} to {high:.2f})")
        0.80 (0.72 to 0.88)
    """
    size = samples if isinstance(samples, int) else len(samples)
    if size < 1:
        raise ValueError(f"samples={size}: a statistic needs one or more samples.")
    if strata is not None and len(strata) != size:
        raise ValueError(f"strata has {len(strata)} entries for {size} samples; give one for each sample.")
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples} must be 1 or more; 1000 is usual.")
    _check_level(level)
    value = statistic(np.arange(size))
    if np.isnan(value).any():
        raise ValueError("The statistic of the samples is NaN; leave out the samples or entries that have none.")

    # `order` lists the samples by stratum. Sample i may be replaced by order[start[i] : start[i] + sizes[i]], the
    # members of its stratum, so one call of the generator resamples all strata.
    number = {stratum: i for i, stratum in enumerate(dict.fromkeys([0] if strata is None else strata))}
    member_of = np.zeros(size, dtype=np.int64) if strata is None else np.array([number[s] for s in strata])
    order = np.argsort(member_of, kind="stable")
    sizes = np.bincount(member_of)
    start = (np.cumsum(sizes) - sizes)[member_of]
    sizes = sizes[member_of]
    generator = np.random.default_rng(seed)
    resampled = np.stack(
        [np.asarray(statistic(order[start + generator.integers(sizes)])) for _ in range(num_resamples)]
    )
    if np.isnan(resampled).any():
        raise ValueError("The statistic is NaN for a resample; give strata that keep what it needs in each resample.")
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    if isinstance(value, np.ndarray) and value.ndim:
        return Intervals(value, low, high)
    return Interval(float(value), float(low), float(high))


def wilson(successes: float | int, total: int, *, ties: int = 0, level: float = 0.95) -> Interval:
    """Return a proportion with Wilson's score interval, which stays within 0 and 1 and is accurate near both.

    Ties that count half have less variance than full successes and failures, so the interval is narrower. A few ties
    are weak evidence of that, so their share is estimated as ``T/(n + z²)`` instead of ``T/n``.

    Args:
        successes: Number of successes, ties counting one half.
        total: n, number of samples, positive.
        ties: T, number of ties.
        level: The nominal coverage of the interval.

    Returns:
        ``p̂ = successes/n`` and the shares p with ``(p̂ - p)² ≤ z² (p (1 - p) - ¼ T/(n + z²))/n``.

    Raises:
        ValueError: There are no samples, more successes than samples, more ties than make sense, or a level outside
            of (0, 1).

    Source:
        Wilson (1927), Probable inference, the law of succession, and statistical inference; a sample that is ½ with
        probability t has the variance ``p (1 - p) - t/4``.

    Example:
        >>> value, low, high = wilson(9, 10)
        >>> print(f"{value:.2f} ({low:.2f} to {high:.2f})")
        0.90 (0.60 to 0.98)
    """
    if not total > 0 or not 0 <= ties / 2 <= successes <= total - ties / 2:
        raise ValueError(
            f"successes={successes}, total={total}, ties={ties}: they must satisfy 0 < total and "
            f"ties/2 <= successes <= total - ties/2; a tie is half a success."
        )
    z2 = normal_quantile(level) ** 2
    share, spread, tied = successes / total, z2 / total, ties / (total + z2)
    center = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (4 * share * (1 - share) + spread - (1 + spread) * tied)) / (2 * (1 + spread))
    # A share of 0 or 1 is itself an end of the interval, which rounding must not move.
    return Interval(share, min(max(center - half, 0.0), share), max(min(center + half, 1.0), share))


def normal_quantile(level: float) -> float:
    """Return z such that a standard normal lies within ±z with probability ``level``: 1.96 for 0.95."""
    _check_level(level)
    return NormalDist().inv_cdf((1 + level) / 2)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1; 0.95 is usual.")
