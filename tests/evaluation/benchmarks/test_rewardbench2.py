from dataclasses import replace

import numpy as np
import pytest

from falign.data import BadRows
from falign.errors import DataError
from falign.evaluation.benchmarks import RewardBench2, missing_subsets
from tests.evaluation.benchmarks.samples import rewardbench2_row, write

BEST_OF_FOUR = ("Factuality", "Precise IF", "Math", "Safety", "Focus")


def read(tmp_path, rows):
    return list(RewardBench2().read(write(tmp_path / "rows.jsonl", rows), bad_rows=BadRows()))


def summary_of(items, scores):
    benchmark = RewardBench2()
    outcomes = [
        benchmark.outcome(item, [float(score) for score in row]) for item, row in zip(items, scores, strict=True)
    ]
    return benchmark.summarize([item.subset for item in items], outcomes)


def ties_rows(rng, prompts):
    tied = [rewardbench2_row("Ties", f"tied:{n}", right=int(rng.integers(2, 6)), wrong=4) for n in range(prompts)]
    return tied + [rewardbench2_row("Ties", f"ref:{n}", right=1, wrong=4) for n in range(prompts)]


def ties_by_hand(items, scores):
    """Return the published score, prompt by prompt on arrays."""
    gaps, spreads = {}, {}
    for item, row in zip(items, scores, strict=True):
        values, right = np.asarray(row), np.asarray(item.preference) == 1
        gaps[item.id] = values[right].min() - values[~right].max()
        spreads[item.id] = np.ptp(values[right])
    numbers = [key.split(":")[1] for key in gaps if key.startswith("tied")]
    tied = np.array([gaps[f"tied:{n}"] for n in numbers])
    ref = np.array([gaps[f"ref:{n}"] for n in numbers])
    spread = np.array([spreads[f"tied:{n}"] for n in numbers])
    both = np.minimum(tied, ref)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.nan_to_num(np.tanh(both / spread - 1), nan=0.0)
    return (
        0.3 * ((ref > 0).mean() + (tied > 0).mean())
        + 0.2 * ((tied > spread).mean() + (both > spread).mean())
        + 0.01 * size.mean()
    )


def test_the_published_schema_is_read(tmp_path):
    (item,) = read(tmp_path, [rewardbench2_row("Ties", "ref:31", right=1, wrong=2)])
    assert (item.id, item.subset, item.group) == ("ref:31", "Ties", "31")
    assert item.completions == ("Right 0.", "Wrong 0.", "Wrong 1.")
    assert item.preference == (1.0, 0.0, 0.0)


def test_the_score_is_the_mean_of_six_subsets(tmp_path):
    rng = np.random.default_rng(1)
    rows = [rewardbench2_row(subset, f"{subset}-{i}") for subset in BEST_OF_FOUR for i in range(20)]
    items = read(tmp_path, rows + ties_rows(rng, 40))
    # The right completions' scores are raised, so that every term of Ties is neither 0 nor 1.
    scores = [rng.normal(size=len(item.preference)) * 0.45 + np.asarray(item.preference) for item in items]
    summary = summary_of(items, scores)

    by_hand = {
        subset: np.mean([np.argmax(row) == 0 for item, row in zip(items, scores, strict=True) if item.subset == subset])
        for subset in BEST_OF_FOUR
    }
    ties = [(item, row) for item, row in zip(items, scores, strict=True) if item.subset == "Ties"]
    by_hand["Ties"] = ties_by_hand(*zip(*ties, strict=True))
    assert all(0 < value < 1 for value in by_hand.values())
    assert {name: summary[name] for name in by_hand} == pytest.approx(by_hand, abs=1e-12)
    assert summary["score"] == pytest.approx(np.mean(list(by_hand.values())), abs=1e-12)
    assert next(iter(summary)) == "score"
    assert 0 < summary["Ties/margin_hard"] < summary["Ties/margin"] < 1


@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
def test_right_answers_of_equal_score_divide_nothing_by_zero(shift, tmp_path):
    items = read(tmp_path, ties_rows(np.random.default_rng(2), 3))
    scores = [[shift * value for value in item.preference] for item in items]
    summary = summary_of(items, scores)
    assert summary["Ties/margin_size"] == shift
    assert summary["Ties"] == pytest.approx(ties_by_hand(items, scores))
    assert summary["Ties"] == pytest.approx({-1.0: -0.01, 0.0: 0.0, 1.0: 1.01}[shift])


def test_a_shared_largest_score_is_shared(tmp_path):
    (item,) = read(tmp_path, [rewardbench2_row("Math", "1")])
    rows = ([1.0, 1.0, 0.0, 1.0], [2.0, 1.0, 0.0, 1.0], [1.0, 2.0, 2.0, 0.0])
    correct = [RewardBench2().outcome(item, row)["correct"] for row in rows]
    assert correct == pytest.approx([1 / 3, 1.0, 0.0])


def test_a_resampled_prompt_is_paired_with_its_own_reference(tmp_path):
    items = read(tmp_path, ties_rows(np.random.default_rng(3), 4))
    rng = np.random.default_rng(4)
    scores = {item.id: rng.normal(size=len(item.preference)) + np.asarray(item.preference) for item in items}
    drawn = [item for n in ("2", "0", "2", "2") for item in items if item.group == n]
    # The same as four distinct prompts, numbered anew.
    renamed = [replace(item, id=f"{item.id}{i // 2}", group=f"{item.group}{i // 2}") for i, item in enumerate(drawn)]
    rows = [scores[item.id] for item in drawn]
    assert summary_of(drawn, rows)["Ties"] == pytest.approx(ties_by_hand(renamed, rows), abs=1e-12)


def test_what_is_missing_leaves_out_the_score(tmp_path):
    items = read(tmp_path, [rewardbench2_row("Math", "1"), rewardbench2_row("Ties", "tied:1", right=2)])
    summary = summary_of(items, [[1, 0, 0, 0], [2, 1, 0, 0, 0]])
    assert missing_subsets(RewardBench2(), [item.subset for item in items]) == (
        "Factuality",
        "Precise IF",
        "Safety",
        "Focus",
    )
    assert summary == {"Math": 1.0, "Ties/tied": 1.0, "accuracy": 1.0}


def test_bad_rows_say_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match=r"num_correct is 2 and there are 1 chosen"):
        read(tmp_path, [rewardbench2_row("Math", "1", num_correct=2)])
    with pytest.raises(DataError, match=r"the id 'about:7' does not fit Ties; it must be 'tied:N' or 'ref:N'"):
        read(tmp_path, [rewardbench2_row("Ties", "about:7")])
    with pytest.raises(DataError, match=r"'chosen' is \[\]; it must be a list of texts"):
        read(tmp_path, [rewardbench2_row("Math", "1", chosen=[])])
