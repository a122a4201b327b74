"""``falign.presample``: prompts in memory, and verifiers that are functions of the program."""

import json

import pytest

import falign
from falign.errors import ConfigError, DataError, RewardError
from falign.evaluation.presampling_run import CHUNK_SIZE
from tests.models.tiny import save_tiny

ROWS = [{"prompt": f"question {i}: ", "number": i} for i in range(CHUNK_SIZE + 4)]
OPTIONS = {"num_completions": 3, "threshold": 2, "max_new_tokens": 4, "chat": False}
INTERRUPTS = iter([False, False, True])


def even(prompts, completions, number, completion_ids):
    return [float(i % 2 == 0 and ids[0] % 5 > 0) for i, ids in zip(number, completion_ids, strict=True)]


def odd(prompts, completions, number, **columns):
    return [float(i % 2) for i in number]


def interrupted(prompts, completions, number, **columns):
    if next(INTERRUPTS, False):
        raise KeyboardInterrupt
    return odd(prompts, completions, number)


def divides(prompts, completions, number, **columns):
    return [1 / (i - 1) for i in number]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("presample") / "tiny")


def contents(folder):
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.glob("*.jsonl")}


def test_rows_in_memory_are_sorted_by_a_function_as_those_of_a_file(model, tmp_path, capsys):
    summary = falign.presample(model, ROWS, tmp_path / "out", verifier=even, **OPTIONS)
    found = contents(tmp_path / "out")
    assert [row["number"] for row in ROWS if row in found["exploration.jsonl"]][:4] != []
    assert all(row["number"] % 2 == 0 and row["completion_ids"][0] % 5 > 0 for row in found["rehearsal.jsonl"])
    assert len(found["rehearsal.jsonl"]) == summary.rehearsal > 0
    assert len(found["exploration.jsonl"]) == summary.exploration == len(ROWS) - summary.rehearsal
    assert all(row in ROWS for row in found["exploration.jsonl"])
    assert summary.never_solved >= len(ROWS) // 2
    assert summary.resumed == 0

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert falign.presample(model, file, tmp_path / "of-file", verifier=even, **OPTIONS) == summary
    assert contents(tmp_path / "of-file") == found
    assert capsys.readouterr().out == ""


def test_a_call_that_was_interrupted_goes_on(model, tmp_path):
    arguments = {"verifier": interrupted, **OPTIONS}
    with pytest.raises(KeyboardInterrupt):
        falign.presample(model, ROWS, tmp_path / "out", **arguments)
    for change, told in (
        ({"seed": 1}, r"seed \(0 there, 1 now\)"),
        ({"verifier": odd}, "identity of the verifier"),
        ({"prompts": ROWS[1:]}, "prompts"),
    ):
        with pytest.raises(ConfigError, match=f"the beginning of another pre-sampling: .*{told}.*overwrite=True"):
            falign.presample(model, **{"prompts": ROWS, "out": tmp_path / "out", **arguments, **change})
    summary = falign.presample(model, ROWS, tmp_path / "out", **arguments)
    assert (summary.resumed, summary.prompts) == (CHUNK_SIZE, len(ROWS))
    whole = falign.presample(model, ROWS, tmp_path / "whole", **arguments)
    assert whole.counts() == summary.counts()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"verifier": 3}, ConfigError, "`verifier` is 3: give a function"),
        ({"verifier": "nothing"}, ConfigError, "reward 'nothing' is unknown"),
        ({"verifier": divides}, RewardError, "ZeroDivisionError"),
        ({"verifier": "number(answer='label')"}, RewardError, "reads the column 'label'"),
        ({"threshold": 4}, ConfigError, "threshold=4 must be from 1 to num_completions=3"),
        ({"bad_rows": "ignore"}, ConfigError, "bad_rows='ignore' is unknown"),
        ({"prompts": ["one", "two"]}, DataError, "python:list row 1: the row is 'one'"),
        ({"prompts": "missing.jsonl"}, DataError, r"missing\.jsonl: no such file"),
        ({"template": "{nothing}"}, DataError, r"python:list row 1.*bad_rows=skip"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_left(model, tmp_path, change, error, message):
    arguments = {"prompts": ROWS[:3], "out": tmp_path / "out", "verifier": even, **OPTIONS, **change}
    with pytest.raises(error, match=message):
        falign.presample(model, **arguments)
    assert not list(tmp_path.rglob("*.json*"))


def test_outputs_are_replaced_only_if_asked_for(model, tmp_path):
    arguments = {"prompts": ROWS[:3], "out": tmp_path / "out", "verifier": odd, **OPTIONS}
    assert falign.presample(model, **arguments).rehearsal == 1
    with pytest.raises(ConfigError, match=r"exploration\.jsonl exists: .* overwrite=True"):
        falign.presample(model, **arguments)
    assert falign.presample(model, **{**arguments, "verifier": even, "overwrite": True}).never_solved >= 1
