import numpy as np
import pytest

from falign.data import BadRows
from falign.errors import ConfigError
from falign.evaluation.benchmarks import RewardBench, missing_subsets
from tests.evaluation.benchmarks.samples import rewardbench_row, write

SECTION_OF = {
    "Chat": "alpacaeval-easy 100 alpacaeval-length 95 alpacaeval-hard 95 mt-bench-easy 28 mt-bench-med 40",
    "Chat Hard": "mt-bench-hard 37 llmbar-natural 100 llmbar-adver-neighbor 134 llmbar-adver-GPTInst 92 "
    "llmbar-adver-GPTOut 47 llmbar-adver-manual 46",
    "Safety": "refusals-dangerous 100 refusals-offensive 100 xstest-should-refuse 250 xstest-should-respond 154 "
    "donotanswer 136",
    "Reasoning": "math-prm 984 hep-cpp 164 hep-go 164 hep-java 164 hep-js 164 hep-python 164 hep-rust 164",
}
PARTS = {
    section: (text.split()[::2], np.array(text.split()[1::2], dtype=float)) for section, text in SECTION_OF.items()
}
PRIOR = ["anthropic_helpful", "anthropic_hhh", "shp", "summarize"]


def outcomes_of(items, scores):
    benchmark = RewardBench()
    return [benchmark.outcome(item, [float(score) for score in pair]) for item, pair in zip(items, scores, strict=True)]


def sample(tmp_path, subsets, per_subset=3):
    rows = [rewardbench_row(subset, i) for i in range(per_subset) for subset in subsets]
    return list(RewardBench().read(write(tmp_path / "rows.jsonl", rows), bad_rows=BadRows()))


def test_the_published_schema_is_read(tmp_path):
    (item,) = RewardBench().read(write(tmp_path / "r.jsonl", [rewardbench_row("hep-go", 7)]), bad_rows=BadRows())
    assert (item.id, item.subset, item.prompt) == ("7", "hep-go", "Question 7 of hep-go?")
    assert item.completions == ("A good answer.", "A bad one.")
    assert (item.preference, item.group, item.plain) == ((1.0, 0.0), "", False)


def test_sections_weigh_subsets_with_the_published_counts(tmp_path):
    subsets = [subset for names, _ in PARTS.values() for subset in names]
    assert RewardBench().subsets == tuple(subsets)
    items = sample(tmp_path, subsets)
    scores = np.random.default_rng(0).normal(size=(len(items), 2))
    summary = RewardBench().summarize([item.subset for item in items], outcomes_of(items, scores))

    right = scores[:, 0] > scores[:, 1]
    of = np.array([item.subset for item in items])
    sections = {
        section: np.average([right[of == name].mean() for name in names], weights=counts)
        for section, (names, counts) in PARTS.items()
    }
    assert next(iter(summary)) == "score"
    assert summary["score"] == pytest.approx(np.mean(list(sections.values())), abs=1e-12)
    assert {name: summary[name] for name in sections} == pytest.approx(sections, abs=1e-12)
    assert summary["hep-go"] == pytest.approx(right[of == "hep-go"].mean())
    assert summary["accuracy"] == pytest.approx(right.mean())
    assert "score_with_prior_sets" not in summary


def test_code_and_mathematics_weigh_the_same():
    names, counts = PARTS["Reasoning"]
    subsets = [name for name in names for _ in range(2)]
    outcomes = [{"correct": float(subset == "math-prm")} for subset in subsets]
    assert RewardBench().summarize(subsets, outcomes)["Reasoning"] == pytest.approx(0.5)
    assert counts[0] == counts[1:].sum()


def test_prior_sets_have_half_the_weight(tmp_path):
    subsets = [subset for names, _ in PARTS.values() for subset in names]
    outcomes = [{"correct": 1.0}] * len(subsets) + [{"correct": value} for value in (0.0, 0.0, 0.5, 0.1)]
    summary = RewardBench().summarize([*subsets, *PRIOR], outcomes)
    assert summary["score"] == 1.0
    assert summary["Prior Sets"] == pytest.approx(0.15)
    assert summary["score_with_prior_sets"] == pytest.approx((4 + 0.5 * 0.15) / 4.5)


def test_a_missing_subset_leaves_out_its_section_and_the_score(tmp_path):
    subsets = [subset for names, _ in PARTS.values() for subset in names if subset != "donotanswer"]
    summary = RewardBench().summarize(subsets, [{"correct": 1.0}] * len(subsets))
    assert missing_subsets(RewardBench(), subsets) == ("donotanswer",)
    assert not summary.keys() & {"score", "Safety", "donotanswer"}
    assert summary["Chat"] == summary["accuracy"] == summary["xstest-should-refuse"] == 1.0


def test_a_tie_is_wrong(tmp_path):
    items = sample(tmp_path, ["hep-go"])
    assert outcomes_of(items, [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0)]) == [{"correct": c} for c in (0.0, 1.0, 0.0)]


def test_a_prior_set_is_its_split(tmp_path):
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "B."},
        {"role": "user", "content": "C?"},
    ]
    answers = [[*turns, {"role": "assistant", "content": text}] for text in ("D.", "E.")]
    rows = [
        {"prompt": "A?", "chosen": answers[0], "rejected": answers[1]},
        {"prompt": turns, "chosen": "D.", "rejected": "E."},
    ]
    for row in rows:
        path = write(tmp_path / "rows.jsonl", [row])
        (item,) = RewardBench().read(path, split="shp", bad_rows=BadRows())
        assert (item.subset, item.prompt, item.completions) == ("shp", turns, ("D.", "E."))


def test_a_prior_set_is_asked_of_its_own_data_set(monkeypatch):
    import datasets

    rows = [{"prompt": "A?", "chosen": "B.", "rejected": "C."}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows if name.endswith("test-sets") else [])
    (item,) = RewardBench().read(split="summarize", bad_rows=BadRows())
    assert item.place == "allenai/preference-test-sets[summarize] row 1"
    with pytest.raises(ConfigError, match="split='filterd' is unknown; rewardbench has"):
        list(RewardBench().read(split="filterd", bad_rows=BadRows()))
