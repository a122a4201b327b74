"""Self-BLEU: the BLEU of each completion against all the others as its references; 1 if all are equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import fmean

import datasets
import evaluate
from sacrebleu.metrics.bleu import BLEU
from typing_extensions import override

from falign.metrics.ngrams import Completion, by_prompt, ngrams

__all__ = ["SelfBleu", "self_bleu"]


def self_bleu(completions: Sequence[Completion], *, max_order: int = 4, tokenize: str = "13a") -> float:
    """Return the mean BLEU of each completion against all the others.

    The sentence BLEU is sacrebleu's, with exponential smoothing and the effective order. n-grams are counted once, so
    the time is linear in the number of completions.

    Args:
        completions: Two or more texts, or lists of tokens.
        max_order: Longest n-grams.
        tokenize: sacrebleu's tokenizer of texts.

    Returns:
        From 0 to 1; low is diverse.

    Raises:
        ValueError: There are fewer than two completions, the order is not positive, or the tokenizer is unknown.

    Source:
        Zhu et al., Texygen (arXiv:1802.01886), section 3; Post (arXiv:1804.08771) for BLEU.

    Example:
        >>> print(f"{self_bleu(['the cat sat on a mat', 'the cat sat on a hat', 'dogs bark']):.3f}")
        0.507
    """
    if len(completions) < 2:
        raise ValueError(f"{len(completions)} completion has no others to be compared with; give two or more.")
    if max_order < 1:
        raise ValueError(f"max_order={max_order} must be 1 or more; 4 is usual.")
    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"tokenize={tokenize!r}: sacrebleu has {', '.join(BLEU.TOKENIZERS)}.")
    tokenizer = BLEU(tokenize=tokenize).tokenizer
    sequences = [c if not isinstance(c, str) else tokenizer(c.rstrip()).split() for c in completions]
    counts = [Counter(gram for n in range(1, max_order + 1) for gram in ngrams(row, n)) for row in sequences]
    # BLEU clips the count of an n-gram by its largest count among the references, here the other completions. That is
    # the largest count of all, except for the completion that has it: there it is the second largest.
    largest: Counter[tuple[Hashable, ...]] = Counter()
    second: Counter[tuple[Hashable, ...]] = Counter()
    for row in counts:
        for gram, count in row.items():
            second[gram] = max(second[gram], min(count, largest[gram]))
            largest[gram] = max(largest[gram], count)
    lengths = Counter(map(len, sequences))
    scores = []
    for sequence, row in zip(sequences, counts, strict=True):
        correct, total = [0] * max_order, [0] * max_order
        for gram, count in row.items():
            total[len(gram) - 1] += count
            # At a tie the second largest equals the largest.
            correct[len(gram) - 1] += min(count, second[gram] if count == largest[gram] else largest[gram])
        score = BLEU.compute_bleu(
            correct,
            total,
            len(sequence),
            _closest(len(sequence), lengths),
            smooth_method="exp",
            effective_order=True,
            max_ngram_order=max_order,
        )
        scores.append(score.score / 100)
    return fmean(scores)


class SelfBleu(evaluate.Metric):
    """:func:`self_bleu` of texts (predictions), or of lists of token ids with the configuration ``"tokens"``."""

    @override
    def _info(self) -> evaluate.MetricInfo:
        row = datasets.List(datasets.Value("int64")) if self.config_name == "tokens" else datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="Zhu et al., Texygen: A Benchmarking Platform for Text Generation Models, arXiv:1802.01886",
            inputs_description="predictions: completions. prompts: the prompt of each completion; the result is then "
            "the mean over prompts of the value among their completions.",
            features=datasets.Features({"predictions": row}),
        )

    @override
    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]: called with the features by name
        self,
        *,
        predictions: Sequence[Completion],
        max_order: int = 4,
        tokenize: str = "13a",
        prompts: Sequence[Hashable] | None = None,
    ) -> dict[str, float]:
        groups = by_prompt(predictions, prompts)
        return {"self_bleu": fmean(self_bleu(group, max_order=max_order, tokenize=tokenize) for group in groups)}


def _closest(length: int, lengths: Counter[int]) -> int:
    """The nearest length among the others, the shorter one at a tie: BLEU's reference length."""
    return min(
        (other for other, count in lengths.items() if count > (other == length)),
        key=lambda other: (abs(other - length), other),
    )
