"""``falign data check`` as a user types it."""

import json
import re
import shlex

import pytest

from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    save_tiny(folder / "tiny")
    return folder


@pytest.fixture
def run_file(folder, tmp_path):
    """Return a function that writes a run file over some rows and returns its path."""

    def write(rows, **changes):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(run_data(folder / "tiny", data, tmp_path / "run", **changes)))
        return path

    return write


def rows(count):
    return [{**PAIR, "prompt": f"q{i}"} for i in range(count)]


def test_a_run_file_is_checked_with_all_that_it_says(falign, run_file, tmp_path):
    path = run_file([*rows(8), {**PAIR, "chosen": "b"}])
    status, out, err = falign("data", "check", path)
    assert (status, f"{tmp_path / 'rows.jsonl'}: 1 bad row" in err) == (2, True)
    assert "rows.jsonl:9: 'chosen' and 'rejected' are equal" in out
    status, out, err = falign("data", "check", run_file([*rows(8), {**PAIR, "chosen": "b"}], data={"bad_rows": "skip"}))
    assert status == 0, err
    assert "data: 2 rows to train on, 6 held out; bad rows 1" in out
    status, _, err = falign("data", "check", run_file(rows(8), data={"eval_size": 8}))
    assert (status, "leaves nothing for training" in err) == (2, True)
    status, _, err = falign("data", "check", run_file(rows(8), training={"tokens_per_batch": 2}))
    assert (status, "training.tokens_per_batch=2 is less than" in err) == (2, True)


@pytest.mark.parametrize("kind", ["pairwise", "listwise", "token_pairwise", "supervised"])
def test_labels_are_bad_rows_where_the_objective_compares(falign, run_file, kind):
    labels = [{"prompt": f"q{i}", "completion": "a", "label": True} for i in range(8)]
    objective = {"kind": kind} if kind == "supervised" else {"kind": kind, "beta": 0.1}
    path = run_file(labels, objective=objective)
    run = json.loads(path.read_text())
    run["objective"] = objective
    path.write_text(json.dumps(run))
    status, out, err = falign("data", "check", path)
    assert status == (0 if kind == "supervised" else 2), out + err
    assert ("no completion is preferred to another" in out) == (kind != "supervised")


def test_labels_without_a_run_file_are_told_of(falign, run_file, tmp_path):
    run_file([{"prompt": "q", "completion": "a", "label": True}])
    status, out, _ = falign("data", "check", tmp_path / "rows.jsonl")
    assert status == 0
    assert "Give the run file in place of the data to check it under its objective" in " ".join(out.split())


@pytest.mark.parametrize("options", [("--max-length", 9), ("--model", "x"), ("--plain",), ("--format", "hh")])
def test_options_that_the_run_file_has_itself_are_refused(falign, run_file, options):
    status, _, err = falign("data", "check", run_file(rows(8)), *options)
    assert status == 2
    assert "run.yaml is a run file, which sets this itself; leave it out" in err


def test_a_run_file_with_prompts_is_refused(falign, folder, tmp_path):
    from tests.training.prompts import online_data, write_prompts

    run = online_data(folder / "tiny", write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "run")
    (tmp_path / "online.yaml").write_text(json.dumps(run))
    status, _, err = falign("data", "check", tmp_path / "online.yaml")
    assert (status, "online.yaml has prompts and no data" in err) == (2, True)


def test_a_remedy_is_told_where_there_is_one(falign, run_file, tmp_path):
    status, _, err = falign("data", "check", run_file([{**PAIR, "chosen": "b"}]))
    assert (status, err.endswith("1 bad row; fix the file.")) == (2, True)
    write_pairs(tmp_path / "rows.jsonl")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{\n")
    status, _, err = falign("data", "check", tmp_path / "rows.jsonl")
    assert (status, err.endswith("1 bad row; fix the file, or set data.bad_rows=skip to leave them out.")) == (2, True)


def test_messages_name_options_but_the_fields_of_a_run_file(falign, folder, run_file, tmp_path):
    write_pairs(tmp_path / "long.jsonl")
    long = [{**PAIR, "prompt": "a long question"}] * 8
    options = ("--plain", "--model", folder / "tiny", "--max-length", 8, "--long-prompt", "drop")
    status, _, err = falign("data", "check", tmp_path / "long.jsonl", *options)
    assert status == 2
    assert "raise --max-length, or cut long texts (--long-prompt cut, --long-completion cut)." in err
    status, out, _ = falign("data", "check", tmp_path / "long.jsonl", *options[:-2])
    assert (
        status,
        "Raise --max-length; a run can also lower --max-completion-length, or set --long-prompt" in out,
    ) == (2, True)
    status, _, err = falign("data", "check", tmp_path / "long.jsonl", "--max-length", 8)
    assert (status, "--max-length needs a tokenizer: give --model." in err) == (2, True)
    status, _, err = falign("data", "check", run_file(long, data={"max_length": 4, "long_prompt": "drop"}))
    assert (status, "raise `data.max_length`, or" in err) == (2, True)
    status, _, err = falign("data", "check", run_file(rows(8)), "--max-length", 8)
    assert (status, "--max-length: " in err) == (2, True)
    source = {"path": str(tmp_path / "rows.jsonl"), "chat": False, "format": "hhh"}
    status, _, err = falign("data", "check", run_file(rows(8), data={"train": [source]}))
    assert (status, "format='hhh' is unknown" in err) == (2, True)
    path = run_file(rows(8), objective={"divergence": "my_own:Divergence"})
    (tmp_path / "manifest.json").write_text("{}")
    status, _, err = falign("data", "check", path)
    assert (status, "objective.divergence=my_own:Divergence" in err, "give --trust-code" in err) == (2, True, True)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"question": "a b", "good": "b", "bad": "c"}, r"set (--columns '.*?\}')"),
        ({**PAIR, "history": "we talked of ships"}, r"or set (--ignore history)"),
    ],
)
def test_a_remedy_for_columns_works_as_it_is_typed(falign, tmp_path, row, found):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    status, out, _ = falign("data", "check", path)
    assert status == 2
    assert falign("data", "check", path, *shlex.split(re.search(found, out)[1]))[0] == 0
