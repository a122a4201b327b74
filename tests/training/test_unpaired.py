"""KTO end to end, on the real model: labeled rows, pairs as two labeled rows, and data that it cannot read."""

import json

import pytest
from rich.console import Console

from falign.errors import DataError
from falign.runfile import parse_run
from falign.training import train
from tests.training.pairs import PLEASANT, RUDE, run_data, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
TRAINING = {"max_steps": 3, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}


def run_of(demo, data, folder, **objective):
    changes = {"data": {"eval_size": 2, "max_length": 64}, "training": {**TRAINING, "logging_steps": 1}}
    content = run_data(demo, data, folder, **changes, sampling={"prompts": []})
    return parse_run({**content, "objective": {"kind": "unpaired", "beta": 0.5, **objective}})


def write_labeled(path, *, split_pairs=False):
    """Nine desirable and three undesirable rows, or six pairs as two rows each, the two of a pair side by side."""
    rows = []
    for i in range(12):
        number, label = (i // 2, i % 2 == 0) if split_pairs else (i, i % 4 > 0)
        completion = (PLEASANT if label else RUDE)[number % 4]
        rows.append({"prompt": f"question {number}: ", "completion": completion, "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_labeled_rows_train_and_their_weights_are_recommended(demo, tmp_path):
    console = Console(record=True, width=200)
    config = run_of(demo, write_labeled(tmp_path / "rows.jsonl"), tmp_path / "run")
    folder = train(config, console=console).folder
    logs = [log for log in folder.metrics() if "loss" in log]
    assert logs[0]["loss"] == pytest.approx(0.5, abs=1e-5)  # π is the reference
    assert logs[0]["reference_point"] == pytest.approx(0, abs=1e-5)
    assert logs[-1]["rewards/desirable"] > logs[-1]["rewards/undesirable"]
    assert logs[-1]["loss"] < 0.5
    assert any("eval_reference_point" in log for log in folder.metrics())
    assert "set undesirable_weight between" in console.export_text()


@pytest.mark.parametrize("point", ["mismatched", "vocabulary"])
def test_pairs_train_as_one_desirable_and_one_undesirable_row(demo, tmp_path, point):
    console = Console(record=True, width=200)
    pairs = run_of(demo, write_pairs(tmp_path / "pairs.jsonl", n=6), tmp_path / "run", reference_point=point)
    if point == "mismatched":
        pairs = run_of(demo, write_labeled(tmp_path / "rows.jsonl", split_pairs=True), tmp_path / "run")
    folder = train(pairs, console=console).folder
    log = [log for log in folder.metrics() if "loss" in log][-1]
    assert log["rewards/desirable"] > log["rewards/undesirable"]
    assert log["reference_point"] > 0
    assert "set undesirable_weight" not in console.export_text()


def test_a_ranked_list_is_refused_before_weights_are_loaded(demo, tmp_path):
    rows = [{"prompt": f"question {i}: ", "completions": ["a", "b"], "scores": [0.3, 0.9]} for i in range(4)]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"ranked.jsonl:\d: the row has the score 0.3.*in place of a ranked list"):
        train(run_of(demo, tmp_path / "ranked.jsonl", tmp_path / "run"), console=Console(quiet=True))
