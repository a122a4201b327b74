"""Entropy in nats: of the policy, from its distribution at each token, and of a sample, from its frequencies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from typing_extensions import override

from falign.metrics.intervals import Interval, bootstrap
from falign.metrics.ngrams import ngrams, tokens
from falign.metrics.numbers import Array, Numbers, float_array

__all__ = ["Entropy", "completion_entropy", "plug_in_entropy", "token_entropy"]


def token_entropy(entropies: Sequence[Numbers], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean entropy per token: ``Σ_i Σ_t H(π(·|s_it)) / Σ_i T_i``.

    Args:
        entropies: For each completion, the entropy of the policy's distribution at each of its tokens.
        level: Nominal coverage of the interval, which resamples completions.
        seed: Seed of the resampling.

    Returns:
        The mean over all tokens and its interval, nats.

    Raises:
        ValueError: There are no completions, one has no tokens, or an entropy is negative or NaN.

    Example:
        >>> token_entropy([[1.0, 2.0, 3.0], [0.0]]).value
        1.5
    """
    sums, lengths = _sums(entropies)
    return bootstrap(lambda i: float(sums[i].sum() / lengths[i].sum()), len(sums), level=level, seed=seed)


def completion_entropy(entropies: Sequence[Numbers], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean over completions of the sum over tokens: on the policy's samples, its entropy over completions.

    By the chain rule ``H(π) = E_π[Σ_t H(π(·|s_t))]``, so that the mean is unbiased, and varies less than that of
    ``-log π``. The arguments are those of :func:`token_entropy`.
    """
    sums, _ = _sums(entropies)
    return bootstrap(lambda index: float(sums[index].mean()), len(sums), level=level, seed=seed)


def plug_in_entropy(symbols: Iterable[Hashable], *, miller_madow: bool = False) -> float:
    """Return ``-Σ p̂ log p̂`` of the frequencies p̂ of some symbols: completions, tokens, n-grams.

    Args:
        symbols: One or more.
        miller_madow: Add the bias correction ``(K - 1)/(2N)`` for K distinct symbols among N. The plain estimate is
            too low, and never exceeds log N.

    Returns:
        The entropy of the sample, nats.

    Raises:
        ValueError: There are no symbols.

    Source:
        Miller (1955), Note on the bias of information estimates.

    Example:
        >>> print(f"{plug_in_entropy('aabb'):.4f} {plug_in_entropy('aabb', miller_madow=True):.4f}")
        0.6931 0.8181
    """
    counts = np.array(list(Counter(symbols).values()), dtype=np.float64)
    if len(counts) == 0:
        raise ValueError("There are no symbols; the entropy of a sample needs one or more.")
    total = counts.sum()
    entropy = math.log(total) - float((counts * np.log(counts)).sum() / total)
    return entropy + (len(counts) - 1) / (2 * total) if miller_madow else entropy


class Entropy(evaluate.Metric):
    """Entropies in nats.

    Of the policy, from the entropies at each token of its completions: :func:`token_entropy` and
    :func:`completion_entropy`. With the configuration ``"texts"`` or ``"tokens"``, :func:`plug_in_entropy` of the
    n-grams of texts or of lists of token ids.
    """

    @override
    def _info(self) -> evaluate.MetricInfo:
        rows = {
            "default": datasets.List(datasets.Value("float64")),
            "texts": datasets.Value("string"),
            "tokens": datasets.List(datasets.Value("int64")),
        }
        if self.config_name not in rows:
            raise ValueError(f"config_name={self.config_name!r}: choose one of {', '.join(rows)}.")
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions: the entropies at the tokens of each completion; as texts or tokens, the "
            "completions.",
            features=datasets.Features({"predictions": rows[self.config_name]}),
        )

    @override
    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]: called with the features by name
        self,
        *,
        predictions: list[Any],  # entropies, texts or tokens
        n: Sequence[int] = (1, 2),
        miller_madow: bool = False,
        level: float = 0.95,
        seed: int = 0,
    ) -> dict[str, float]:
        if self.config_name == "default":
            return {
                **token_entropy(predictions, level=level, seed=seed).entries("entropy"),
                **completion_entropy(predictions, level=level, seed=seed).entries("completion_entropy"),
            }
        return {
            f"entropy-{each}": plug_in_entropy(
                (gram for completion in predictions for gram in ngrams(tokens(completion), each)),
                miller_madow=miller_madow,
            )
            for each in n
        }


def _sums(entropies: Sequence[Numbers]) -> tuple[Array, Array]:
    rows = [float_array(row, f"entropies[{i}]") for i, row in enumerate(entropies)]
    for i, row in enumerate(rows):
        if len(row) == 0:
            raise ValueError(f"entropies[{i}] is empty; a completion has one or more tokens, the stop token included.")
        if not (row >= 0).all():
            worst = row[~(row >= 0)][0]
            raise ValueError(f"entropies[{i}] has {worst}; the entropy of a distribution is 0 or more.")
    return np.array([math.fsum(row) for row in rows]), np.array([float(len(row)) for row in rows])
