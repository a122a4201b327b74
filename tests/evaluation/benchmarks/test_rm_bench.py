import json

import numpy as np
import pytest

from falign.data import BadRows
from falign.errors import DataError
from falign.evaluation.benchmarks import RMBench, missing_subsets
from tests.evaluation.benchmarks.samples import rm_bench_row, write

SUBSETS = ("chat", "code", "math", "safety-refuse", "safety-response")


def read(path):
    return list(RMBench().read(str(path), bad_rows=BadRows()))


def summary_of(items, scores):
    benchmark = RMBench()
    outcomes = [
        benchmark.outcome(item, [float(score) for score in row]) for item, row in zip(items, scores, strict=True)
    ]
    return benchmark.summarize([item.subset for item in items], outcomes)


def levels_by_hand(scores):
    """Return easy, normal, hard and the matrix of scores [n, 6]."""
    right, wrong = scores[:, :3], scores[:, 3:]
    matrix = (right[:, :, None] > wrong[:, None, :]).mean(axis=0)
    easy = (matrix[1, 0] + matrix[2, 0] + matrix[2, 1]) / 3
    hard = (matrix[0, 1] + matrix[0, 2] + matrix[1, 2]) / 3
    return easy, matrix.trace() / 3, hard, matrix


def test_domains_levels_and_score_are_the_published_means(tmp_path):
    rng = np.random.default_rng(0)
    sizes = dict(zip(SUBSETS, (5, 8, 13, 7, 3), strict=True))
    rows = [rm_bench_row(f"{subset}-{i}", domain=subset) for subset, size in sizes.items() for i in range(size)]
    items = read(write(tmp_path / "total_dataset.jsonl", rows))
    scores = rng.normal(size=(len(items), 6)) + np.array([0.3, 0.9, 1.0, 0.0, 0.4, 0.8])
    summary = summary_of(items, scores)

    of = np.array([item.subset.split("-")[0] for item in items])
    by_domain = {domain: levels_by_hand(scores[of == domain]) for domain in ("chat", "code", "math", "safety")}
    for domain, (easy, normal, hard, matrix) in by_domain.items():
        assert summary[domain] == pytest.approx(matrix.mean(), abs=1e-12)
        assert summary[domain] == pytest.approx((easy + normal + hard) / 3, abs=1e-12)
        assert [summary[f"{domain}/{level}"] for level in ("easy", "normal", "hard")] == pytest.approx(
            [easy, normal, hard], abs=1e-12
        )
        assert summary[f"{domain}/matrix/plain/markdown"] == pytest.approx(matrix[1, 2], abs=1e-12)
        assert summary[f"{domain}/matrix/markdown/concise"] == pytest.approx(matrix[2, 0], abs=1e-12)
    assert list(summary)[:4] == ["score", "easy", "normal", "hard"]
    assert summary["score"] == pytest.approx(np.mean([part[3].mean() for part in by_domain.values()]), abs=1e-12)
    for i, level in enumerate(("easy", "normal", "hard")):
        assert summary[level] == pytest.approx(np.mean([part[i] for part in by_domain.values()]), abs=1e-12)
    refuse = scores[np.array([item.subset for item in items]) == "safety-refuse"]
    assert summary["safety-refuse/hard"] == pytest.approx(levels_by_hand(refuse)[2], abs=1e-12)


def test_ties_are_wrong(tmp_path):
    (item,) = read(write(tmp_path / "code_filtered.jsonl", [rm_bench_row("1")]))
    outcome = RMBench().outcome(item, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    assert (outcome["easy"], outcome["normal"], outcome["hard"], outcome["correct"]) == (1.0, 0.0, 0.0, 1 / 3)


def test_a_missing_subset_leaves_out_its_domain_and_the_score(tmp_path):
    rows = [rm_bench_row(str(i), domain=subset) for i, subset in enumerate(("code", "safety-refuse"))]
    items = read(write(tmp_path / "rows.jsonl", rows))
    summary = summary_of(items, [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    assert missing_subsets(RMBench(), [item.subset for item in items]) == ("chat", "math", "safety-response")
    assert not summary.keys() & {"score", "easy", "safety", "chat"}
    assert (summary["code"], summary["safety-refuse"], summary["safety-refuse/hard"]) == (1.0, 0.0, 0.0)
    assert summary["accuracy"] == 0.5


def test_the_domain_is_told_by_the_file_name_or_the_column(tmp_path):
    (tmp_path / "math_filtered.json").write_text(json.dumps([rm_bench_row("1")]))
    write(tmp_path / "safety-response_filtered.jsonl", [rm_bench_row("2"), rm_bench_row("3")])
    (tmp_path / "total_dataset.json").write_text(json.dumps([rm_bench_row("1", domain="math")]))
    assert [(item.id, item.subset) for item in read(tmp_path)] == [
        ("1", "math"),
        ("2", "safety-response"),
        ("3", "safety-response"),
    ]
    assert [item.subset for item in read(tmp_path / "total_dataset.json")] == ["math"]
    with pytest.raises(DataError, match=r"the domain is None; a column 'domain', or a file name like code_filtered"):
        read(write(tmp_path / "mine.jsonl", [rm_bench_row("1")]))


def test_other_than_three_styles_are_refused(tmp_path):
    row = rm_bench_row("1", chosen=["one", "two"])
    with pytest.raises(DataError, match="'chosen' has 2 texts; it must have 3, one of each style"):
        read(write(tmp_path / "code_filtered.jsonl", [row]))


def test_the_real_files_are_read_whole(shared_data):
    folder = shared_data("rm-bench")
    items = read(folder)
    found = {subset: sum(item.subset == subset for item in items) for subset in SUBSETS}
    assert found == {"chat": 0, "code": 228, "math": 0, "safety-refuse": 284, "safety-response": 157}
    assert all(len(item.completions) == 6 for item in items)
    # Concise answers are shorter than detailed ones almost always.
    by_length = summary_of(items, [[float(len(text)) for text in item.completions] for item in items])
    assert by_length["code/easy"] > 0.7 > 0.3 > by_length["code/hard"]
    assert missing_subsets(RMBench(), [item.subset for item in items]) == ("chat", "math")
