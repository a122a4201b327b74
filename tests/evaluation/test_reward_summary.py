import math

import numpy as np
import pytest

from falign.evaluation import benchmarks, scores_with_intervals, summarize_scorer


def row(correct, *, subset="Natural", group="", scores=(0.5, -0.5), preference=(1.0, 0.0), name="implicit_reward"):
    return {
        "place": "rows.jsonl:1",
        "id": "1",
        "subset": subset,
        "group": group,
        "preference": list(preference),
        "num_tokens": [3] * len(preference),
        "scores": {name: list(scores)},
        "outcome": {name: correct if isinstance(correct, dict) else {"correct": float(correct)}},
    }


LLMBAR = benchmarks.get("llmbar")
ROWS = [row(i % 4 > 0, subset="Natural") for i in range(40)] + [row(i % 2, subset="Manual") for i in range(20)]


def test_values_are_the_benchmarks_and_intervals_those_of_the_bootstrap_within_subsets():
    scores = scores_with_intervals(ROWS, LLMBAR, "implicit_reward", seed=3)
    outcomes = [each["outcome"]["implicit_reward"] for each in ROWS]
    summary = LLMBAR.summarize([each["subset"] for each in ROWS], outcomes)
    assert {name: score["value"] for name, score in scores.items()} == pytest.approx(summary)
    assert scores["Natural"]["value"] == 0.75
    # The share of a subset is a binomial one, as its number of items is the same in every resample.
    for name, p, n in (("Natural", 0.75, 40), ("Manual", 0.5, 20)):
        width = 2 * 1.96 * math.sqrt(p * (1 - p) / n)
        assert scores[name]["high"] - scores[name]["low"] == pytest.approx(width, rel=0.15)
    assert scores == scores_with_intervals(ROWS, LLMBAR, "implicit_reward", seed=3)


def test_items_of_a_group_are_drawn_together():
    """A prompt of Ties needs its reference, or the subset has no score; and it is no independent sample."""
    ties, rows = benchmarks.get("rewardbench2"), []
    generator = np.random.default_rng(0)
    for i in range(12):
        gaps = generator.normal(0.2, 1.0, size=2)
        for tied, gap in zip((1.0, 0.0), gaps, strict=True):
            outcome = {"correct": float(gap > 0), "gap": gap, "spread": 0.3, "tied": tied, "group": float(i)}
            rows.append(row(outcome, subset="Ties", group=str(i)))
    scores = scores_with_intervals(rows, ties, "implicit_reward")
    assert scores["Ties"]["low"] < scores["Ties"]["value"] < scores["Ties"]["high"]


def test_calibration_is_that_of_the_logistic_function_of_every_pairs_margin():
    rows = [
        row(1, scores=(2.0, 0.0)),
        row(0, scores=(-1.0, 0.0)),
        row(0.5, scores=(1.0, 0.5, 3.0), preference=(2.0, 1.0, 2.0)),
    ]
    summary = summarize_scorer(rows, LLMBAR, "implicit_reward")["calibration"]
    p = 1 / (1 + np.exp(-np.array([2.0, -1.0, 0.5, 2.5])))
    assert summary["brier"] == pytest.approx(np.mean((1 - p) ** 2))
    assert sum(each["count"] for each in summary["bins"]) == 4
    gaps = [each["count"] * abs(each["confidence"] - each["accuracy"]) for each in summary["bins"]]
    assert summary["ece"] == pytest.approx(sum(gaps) / 4)


@pytest.mark.parametrize("name", ["log_ratio", "logprob", "length", "random"])
def test_scorers_whose_differences_are_no_log_odds_have_no_calibration(name):
    assert summarize_scorer([row(1, name=name)], LLMBAR, name)["calibration"] is None
