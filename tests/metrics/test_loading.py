"""Every metric is a file that evaluate loads, without a network and without being asked to trust anything."""

import importlib
import math
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

import falign.metrics

FOLDER = Path(falign.metrics.__file__).parent
HALF, TWO = math.log(0.5), math.log(2)

CASES = {
    "reward_accuracy": (
        {"predictions": [[2.0, 1.0], [0.0, 3.0]], "references": [[1, 0], [1, 0]]},
        {"reward_accuracy": 0.5, "top1": 0.5},
    ),
    "calibration": (
        {"predictions": [0.0, 0.0], "references": [1, 0]},
        {"ece": 0.0, "brier": 0.25, "bins": [{"confidence": 0.5, "accuracy": 0.5, "count": 2}]},
    ),
    "pass_at_k": ({"predictions": [[1.0, 0.0, 0.0], [0.0] * 4], "k": [1, 3]}, {"pass@1": 1 / 6, "pass@3": 0.5}),
    "distinct_n": ({"predictions": ["a b a", "a b c"]}, {"distinct-1": 0.5, "distinct-2": 0.75}),
    "self_bleu": ({"predictions": ["one two three four", "one two three four"]}, {"self_bleu": 1.0}),
    "entropy": ({"predictions": [[1.0, 2.0], [0.0]]}, {"entropy": 1.0, "completion_entropy": 1.5}),
    "divergence": (
        {"predictions": [[HALF, HALF]], "references": [[2 * HALF, HALF]], "divergence": "reverse_kl"},
        {"log_ratio": TWO, "sequence": TWO - 0.5, "token": TWO - 0.5},
    ),
    "win_rate": (
        {"predictions": ["a"] * 4, "references": ["b"] * 4, "outcomes": [1, 1, 0.5, 0]},
        {},
    ),
}


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")


def metric_files():
    return [path for path in FOLDER.glob("*.py") if "evaluate.Metric)" in path.read_text(encoding="utf-8")]


def test_every_metric_has_a_case():
    assert {path.stem for path in metric_files()} == set(CASES)


@pytest.mark.parametrize("path", metric_files(), ids=lambda path: path.stem)
def test_evaluate_loads_the_file_and_computes(path):
    inputs, expected = CASES[path.stem]
    result = evaluate.load(str(path)).compute(**inputs)
    for name, value in expected.items():
        assert result[name] == (pytest.approx(value) if isinstance(value, float) else value), name
        if f"{name}_low" in result:
            assert result[f"{name}_low"] <= result[name] <= result[f"{name}_high"]


def test_strengths_come_as_rows_the_best_first():
    comparisons = {"predictions": ["a", "a", "b", "a"], "references": ["b"] * 2 + ["a"] * 2, "outcomes": [0, 0.5, 0, 0]}
    comparisons["references"][3] = "b"
    best, worst = evaluate.load(str(FOLDER / "win_rate.py")).compute(**comparisons)["models"]
    assert (best["model"], best["comparisons"], best["win_rate"]) == ("b", 4, 0.625)
    assert (worst["model"], worst["win_rate"]) == ("a", 0.375)
    assert best["strength"] - worst["strength"] == pytest.approx(math.log(0.625 / 0.375))
    assert best["strength_low"] < best["strength"] < best["strength_high"]


@pytest.mark.parametrize("name", ["distinct_n", "self_bleu", "entropy"])
def test_lists_of_token_ids_are_a_configuration(name):
    metric = evaluate.load(str(FOLDER / f"{name}.py"), "tokens")
    result = metric.compute(predictions=[[5, 6, 7, 8], [5, 6, 7, 8, 9]])
    text = evaluate.load(str(FOLDER / f"{name}.py"), "texts").compute(predictions=["5 6 7 8", "5 6 7 8 9"])
    assert result == pytest.approx(text)


def test_batches_add_up():
    metric = evaluate.load(str(FOLDER / "calibration.py"))
    metric.add_batch(predictions=[0.3, -1.0], references=[1, 0])
    metric.add(prediction=2.0, reference=0)
    whole = metric.compute(num_bins=3)
    assert whole == evaluate.load(str(FOLDER / "calibration.py")).compute(
        predictions=[0.3, -1.0, 2.0], references=[1, 0, 0], num_bins=3
    )


def test_one_result_per_prompt_is_averaged():
    metric = importlib.import_module("falign.metrics.distinct_n").DistinctN()
    result = metric.compute(predictions=["a a", "b c", "a d"], prompts=["p", "q", "p"], n=[1])
    assert result == {"distinct-1": (2 / 4 + 1) / 2}


def test_import_falign_and_its_intervals_loads_no_evaluate():
    code = "import sys, falign, falign.metrics; print({'evaluate', 'datasets', 'sacrebleu'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
