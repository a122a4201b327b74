import json
from collections import Counter

import numpy as np
import pytest

from falign.data import BadRows
from falign.errors import DataError
from falign.evaluation.benchmarks import LLMBar, missing_subsets
from tests.evaluation.benchmarks.samples import llmbar_row, write

COUNTS = {"Natural": 100, "Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46}


def read(path):
    return list(LLMBar().read(str(path), bad_rows=BadRows()))


def test_the_score_is_the_mean_of_five_subsets(tmp_path):
    rng = np.random.default_rng(0)
    of = np.array([subset for subset, count in COUNTS.items() for _ in range(count // 10)])
    labels = rng.integers(1, 3, size=len(of))
    rows = [llmbar_row(int(label), subset=subset) for subset, label in zip(of, labels, strict=True)]
    items = read(write(tmp_path / "rows.jsonl", rows))
    scores = rng.normal(size=(len(of), 2))
    outcomes = [LLMBar().outcome(item, pair.tolist()) for item, pair in zip(items, scores, strict=True)]
    summary = LLMBar().summarize([item.subset for item in items], outcomes)

    right = np.argmax(scores, axis=1) + 1 == labels
    means = {subset: right[of == subset].mean() for subset in COUNTS}
    assert {subset: summary[subset] for subset in COUNTS} == pytest.approx(means, abs=1e-12)
    assert summary["score"] == pytest.approx(np.mean(list(means.values())), abs=1e-12)
    assert summary["Adversarial"] == pytest.approx(np.mean(list(means.values())[1:]), abs=1e-12)
    assert summary["accuracy"] == pytest.approx(right.mean(), abs=1e-12)
    assert next(iter(summary)) == "score"


def test_a_tie_counts_half(tmp_path):
    (item,) = read(write(tmp_path / "rows.jsonl", [llmbar_row(2)]))
    assert [LLMBar().outcome(item, pair)["correct"] for pair in ([1.0, 1.0], [0.0, 1.0], [1.0, 0.0])] == [0.5, 1.0, 0.0]


def test_the_folder_of_the_repository_tells_the_subsets(tmp_path):
    folders = {"Natural": "Natural"} | {f"Adversarial/{name}": name for name in ("Neighbor", "GPTInst")}
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "dataset.json").write_text(json.dumps([llmbar_row(1), llmbar_row(2)]))
    items = read(tmp_path)
    assert Counter(item.subset for item in items) == dict.fromkeys(folders.values(), 2)
    assert [item.subset for item in read(tmp_path / "Adversarial/Neighbor/dataset.json")] == ["Neighbor", "Neighbor"]
    assert missing_subsets(LLMBar(), [item.subset for item in items]) == ("GPTOut", "Manual")
    summary = LLMBar().summarize([item.subset for item in items], [{"correct": 1.0}] * len(items))
    assert not summary.keys() & {"score", "Adversarial"}


def test_the_hub_s_subset_names_are_the_same(tmp_path):
    (item,) = read(write(tmp_path / "rows.jsonl", [llmbar_row(1, subset="Adversarial_GPTOut")]))
    assert item.subset == "GPTOut"


@pytest.mark.parametrize("label", [0, 3, True, "A", None, [1]])
def test_other_labels_are_refused(label, tmp_path):
    with pytest.raises(DataError, match=r"'label' is .*; it must be 1 or 2, the better output"):
        read(write(tmp_path / "rows.jsonl", [llmbar_row(label)]))


def test_without_a_file_the_error_says_where_they_are():
    with pytest.raises(DataError, match=r"its Hub dataset is a script.*Dataset/LLMBar of github"):
        list(LLMBar().read(bad_rows=BadRows()))


def test_the_real_files_are_read_whole(shared_data):
    items = read(shared_data("llmbar/llmbar.jsonl.gz"))
    assert Counter(item.subset for item in items) == COUNTS
    assert len({(item.subset, item.id) for item in items}) == 419
    # Which output is better has nothing to do with its place.
    assert sum(item.preference[0] for item in items) == 206
    human = read(shared_data("llmbar/mt_bench_human.jsonl.gz"))
    assert len(human) == 200
    assert {item.subset for item in human} == {""}
    assert LLMBar().summarize([""], [{"correct": 1.0}]) == {"accuracy": 1.0}
