"""The lines of ``falign train`` on data that are not all trained on, or not only."""

import json

import pytest

from tests.models.tiny import save_tiny
from tests.training.pairs import run_data
from tests.training.prompts import online_data

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
ONE_STEP = {"max_steps": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def train(falign, tmp_path):
    """Return a function that trains a run, and returns what was printed and the rows of its record by section."""

    def run(content):
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(content))
        status, out, err = falign("train", path, columns=1000)
        assert status == 0, err
        rows = (tmp_path / "run" / "rows.txt").read_text()
        return " ".join(f"{out} {err}".split()), rows

    return run


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count):
    return [{"prompt": f"question {i}: ", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(count)]


def test_an_imitating_objective_says_what_it_leaves_out(model, train, tmp_path):
    labels = [{"prompt": f"label {i}: ", "completion": "yes", "label": i % 2 == 0} for i in range(6)]
    files = [write(tmp_path / "pairs.jsonl", pairs(8)), write(tmp_path / "labels.jsonl", labels)]
    run = run_data(model, files[0], tmp_path / "run", training=ONE_STEP, sampling={"prompts": []})
    run["data"] = {"train": [{"path": str(file), "chat": False} for file in files], "max_length": 64}
    run["objective"] = {"kind": "supervised"}
    said, rows = train(run)
    assert "data: 14 rows to train on, 0 held out" in said
    assert (
        "it imitates the preferred completions; left out: 8 completions that are not the preferred ones and 3 rows "
        "with label false"
    ) in said
    assert rows.count("\n") == 11


def test_offline_held_out_prompts_that_are_trained_on_are_told(model, train, tmp_path):
    data = write(tmp_path / "pairs.jsonl", pairs(8))
    held_out = write(tmp_path / "eval.jsonl", pairs(10)[5:])
    run = run_data(model, data, tmp_path / "run", training=ONE_STEP, sampling={"prompts": []})
    run["data"] |= {"eval": [{"path": str(held_out), "chat": False}], "eval_size": 0}
    said, _ = train(run)
    assert "data: 8 rows to train on, 5 held out" in said
    assert "warning: 3 held-out prompts also occur in training, so held-out values are too optimistic." in said


def test_online_held_out_prompts_that_are_trained_on_are_told(model, train, tmp_path):
    prompts = [{"prompt": row["prompt"]} for row in pairs(10)]
    run = online_data(model, write(tmp_path / "prompts.jsonl", prompts[:8]), tmp_path / "run", training=ONE_STEP)
    held_out = {"path": str(write(tmp_path / "eval.jsonl", prompts[5:])), "chat": False}
    run["prompts"] |= {"eval": [held_out], "eval_size": 0}
    run["rollout"] |= {"evaluation": {"completions": 2}}
    said, _ = train(run)
    assert "warning: 3 of 5 held-out prompts also occur in training, so" in said
