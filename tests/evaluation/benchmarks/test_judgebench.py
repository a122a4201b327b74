import numpy as np
import pytest

from falign.data import BadRows
from falign.errors import ConfigError, DataError
from falign.evaluation.benchmarks import JudgeBench, missing_subsets
from tests.evaluation.benchmarks.samples import judgebench_row, write

SOURCES = {
    "mmlu-pro-law": "Knowledge",
    "mmlu-pro-computer science": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}


def read(path):
    return list(JudgeBench().read(path, bad_rows=BadRows()))


def test_the_score_is_the_mean_over_all_pairs_in_either_order(tmp_path):
    rng = np.random.default_rng(0)
    sources = rng.choice(list(SOURCES), size=60, p=[0.4, 0.2, 0.2, 0.1, 0.1])
    a_is_right = rng.random(60) < 0.5
    labels = np.where(a_is_right, "A>B", "B>A").tolist()
    pairs = zip(sources.tolist(), labels, strict=True)
    rows = [judgebench_row(source, label, i) for i, (source, label) in enumerate(pairs)]
    items = read(write(tmp_path / "pairs.jsonl", rows))
    scores = rng.normal(size=(60, 2))
    outcomes = [JudgeBench().outcome(item, pair.tolist()) for item, pair in zip(items, scores, strict=True)]
    summary = JudgeBench().summarize([item.subset for item in items], outcomes)

    right = (scores[:, 0] > scores[:, 1]) == a_is_right
    of = np.array([SOURCES[source] for source in sources])
    assert next(iter(summary)) == "score"
    assert summary["score"] == summary["accuracy"] == pytest.approx(right.mean(), abs=1e-12)
    for category in set(SOURCES.values()):
        assert summary[category] == pytest.approx(right[of == category].mean(), abs=1e-12)

    other = {"A>B": "B>A", "B>A": "A>B"}
    mirrored = [
        row | {"response_A": row["response_B"], "response_B": row["response_A"], "label": other[row["label"]]}
        for row in rows
    ]
    others = read(write(tmp_path / "mirrored.jsonl", mirrored))
    assert [JudgeBench().outcome(i, pair[::-1].tolist()) for i, pair in zip(others, scores, strict=True)] == outcomes


def test_a_tie_counts_half(tmp_path):
    (item,) = read(write(tmp_path / "pairs.jsonl", [judgebench_row("livecodebench", "B>A")]))
    assert item.preference == (0.0, 1.0)
    assert [JudgeBench().outcome(item, pair)["correct"] for pair in ([1.0, 1.0], [0.0, 1.0], [1.0, 0.0])] == [
        0.5,
        1.0,
        0.0,
    ]


def test_a_missing_category_leaves_out_the_score_and_other_sources_are_kept(tmp_path):
    rows = [judgebench_row("livebench-math", "A>B"), judgebench_row("my-own", "A>B")]
    items = read(write(tmp_path / "pairs.jsonl", rows))
    subsets = [item.subset for item in items]
    assert subsets == ["Math", "my-own"]
    assert missing_subsets(JudgeBench(), subsets) == ("Knowledge", "Reasoning", "Coding")
    summary = JudgeBench().summarize(subsets, [{"correct": 1.0}, {"correct": 0.0}])
    assert summary == {"Math": 1.0, "my-own": 0.0, "accuracy": 0.5}


@pytest.mark.parametrize("label", ["A=B", "a>b", 1, None, ["A>B"]])
def test_other_labels_are_refused(label, tmp_path):
    with pytest.raises(DataError, match=r"'label' is .*; it must be one of \['A>B', 'B>A'\]"):
        read(write(tmp_path / "pairs.jsonl", [judgebench_row("livebench-math", label)]))


def test_an_unknown_split_of_the_hub_is_refused():
    with pytest.raises(ConfigError, match=r"split='test' is unknown; judgebench has \['gpt', 'claude'\]"):
        list(JudgeBench().read(split="test", bad_rows=BadRows()))
