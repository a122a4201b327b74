import math
from itertools import product

import numpy as np
import pytest
import torch

from falign.metrics.entropy import completion_entropy, plug_in_entropy, token_entropy


def test_means_over_tokens_and_over_completions():
    rows = [[1.0, 2.0, 3.0], [0.5]]
    assert token_entropy(rows).value == 6.5 / 4
    assert completion_entropy(rows).value == 6.5 / 2


def test_completion_entropy_is_that_of_the_law_of_completions():
    # Two tokens, three steps, each step's law depending on all before: enumerated.
    generator = torch.Generator().manual_seed(0)
    laws = {
        prefix: torch.rand(2, generator=generator, dtype=torch.float64).softmax(dim=0)
        for length in range(3)
        for prefix in product((0, 1), repeat=length)
    }
    exact, weights, rows = 0.0, [], []
    for completion in product((0, 1), repeat=3):
        steps = [laws[completion[:t]] for t in range(3)]
        p = math.prod(step[token].item() for step, token in zip(steps, completion, strict=True))
        exact -= p * math.log(p)
        weights.append(p)
        rows.append([-(step * step.log()).sum().item() for step in steps])
    mean = sum(p * completion_entropy([row]).value for p, row in zip(weights, rows, strict=True))
    assert mean == pytest.approx(exact, rel=1e-12)


def test_the_interval_of_a_ratio_is_that_of_the_delta_method_for_many_completions():
    # Long completions have low entropies, so that numerator and denominator vary together.
    lengths = np.random.default_rng(1).integers(1, 11, size=3000)
    value, low, high = token_entropy([np.full(length, 10.0 / length) for length in lengths])
    residuals = 10.0 - value * lengths
    half = 1.96 * residuals.std() / lengths.mean() / math.sqrt(len(lengths))
    assert value == pytest.approx(10.0 / lengths.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.15 * half)


def test_plug_in_entropy_is_that_of_the_frequencies():
    assert plug_in_entropy("aaab") == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert plug_in_entropy([(1, 2)] * 5) == 0.0
    assert plug_in_entropy(range(8)) == pytest.approx(math.log(8))


def test_the_correction_takes_most_of_the_bias():
    generator = np.random.default_rng(2)
    samples = [generator.integers(0, 8, size=60).tolist() for _ in range(400)]
    plain = np.mean([plug_in_entropy(sample) for sample in samples])
    corrected = np.mean([plug_in_entropy(sample, miller_madow=True) for sample in samples])
    assert math.log(8) - plain == pytest.approx(7 / 120, rel=0.15)
    assert corrected == pytest.approx(math.log(8), abs=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_entropy([[1.0], []]), r"entropies\[1\] is empty; a completion has one or more tokens"),
        (lambda: token_entropy([[1.0, -0.5]]), r"entropies\[0\] has -0.5"),
        (lambda: completion_entropy([[1.0, math.nan]]), r"entropies\[0\] has"),
        (lambda: token_entropy([]), "samples=0"),
        (lambda: plug_in_entropy([]), "There are no symbols"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
