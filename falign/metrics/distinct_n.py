"""distinct-n: the share of distinct n-grams among all n-grams of some completions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import fmean

import datasets
import evaluate
from typing_extensions import override

from falign.metrics.ngrams import Completion, by_prompt, distinct

__all__ = ["DistinctN", "distinct"]


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
            "completion; the result is then the mean over prompts of the value among their completions.",
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
