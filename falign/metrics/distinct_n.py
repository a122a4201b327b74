"""distinct-n: the share of different n-grams among all n-grams of some completions."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from statistics import fmean

import datasets
import evaluate
from typing_extensions import override

from falign.metrics.ngrams import Completion, by_prompt, ngrams, tokens

__all__ = ["DistinctN", "distinct"]


def distinct(completions: Iterable[Completion], n: int) -> float:
    """Return the share of different n-grams among all n-grams of some completions; 0 where there is none.

    It falls with the number and the length of the completions: compare only where both are alike.

    Args:
        completions: Texts, whose tokens are words between white space, or lists of tokens.
        n: Length of the n-grams, in tokens.

    Returns:
        From 0 to 1, where none occurs twice.

    Raises:
        ValueError: n is not positive.

    Source:
        Li et al. (arXiv:1510.03055), section 5.1.

    Example:
        >>> distinct(["a b a", "a b c"], 1), distinct([[5, 6, 5], [5, 6, 7]], 2)
        (0.5, 0.75)
    """
    grams = [gram for completion in completions for gram in ngrams(tokens(completion), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


class DistinctN(evaluate.Metric):
    """:func:`distinct` of texts (predictions), or of lists of token ids with the configuration ``"tokens"``."""

    @override
    def _info(self) -> evaluate.MetricInfo:
        row = datasets.List(datasets.Value("int64")) if self.config_name == "tokens" else datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models, "
            "arXiv:1510.03055",
            inputs_description="predictions: completions. n: lengths of n-grams. prompts: the prompt of each "
            "completion; the result is then the mean over prompts of what their completions have among themselves.",
            features=datasets.Features({"predictions": row}),
        )

    @override
    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]: called with the features by name
        self,
        *,
        predictions: Sequence[Completion],
        n: Sequence[int] = (1, 2),
        prompts: Sequence[Hashable] | None = None,
    ) -> dict[str, float]:
        groups = by_prompt(predictions, prompts)
        return {f"distinct-{each}": fmean(distinct(group, each) for group in groups) for each in n}
