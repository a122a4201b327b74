"""Online runs find rows and rewards that cannot be judged before any weight is loaded."""

import json
import shutil

import pytest
from rich.console import Console

from falign.errors import ConfigError, DataError, RewardError
from falign.runfile import parse_run
from falign.training import train
from tests.training.prompts import online_data


@pytest.fixture
def without_weights(tiny, tmp_path):
    """A model folder from which no weight can be loaded: what is found here is found before that."""
    return shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture
def refused(without_weights, tmp_path):
    def run(rows, rewards, error, **prompts):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"question {i}: ", **row}) + "\n" for i, row in enumerate(rows)))
        data = online_data(without_weights, path, tmp_path / "run", rewards=rewards)
        data["prompts"] = {**data["prompts"], "eval_size": 1, **prompts}
        with pytest.raises(error) as caught:
            train(parse_run(data), console=Console(quiet=True))
        return str(caught.value)

    return run


GOOD = [{"answer": 4}, {"answer": "5"}, {"answer": "6"}]


@pytest.mark.parametrize(
    ("reward", "rows", "message"),
    [
        ({"kind": "number"}, [*GOOD, {"answer": "tower"}], "reward number: the answer 'tower' holds no finite number"),
        ({"kind": "number"}, [*GOOD, {}], "reward number: the answer is missing"),
        ({"kind": "choice"}, [{"answer": "A"}, {"answer": 2}], "reward choice: the answer 2 is not one of the letters"),
        (
            {"kind": "words", "column": "answer"},
            [{"answer": "a"}, {"answer": []}],
            "reward words: column 'answer' is []; it must hold words",
        ),
        (
            {"kind": "regex", "pattern": "(a)", "answer": "answer"},
            [*GOOD, {"answer": None}],
            "reward regex: the answer is missing",
        ),
    ],
)
def test_a_row_that_cannot_be_judged_is_named(refused, reward, rows, message):
    found = refused(rows, [reward], DataError)
    assert f"prompts.jsonl:{len(rows)}: {message}" in found
    assert "bad_rows=skip" in found


def test_such_rows_are_left_out_where_bad_rows_are_skipped(refused):
    rows = [{"answer": "none"}] * 3
    found = refused(rows, [{"kind": "number"}], DataError, bad_rows="skip", eval_size=0)
    assert "none of its rows is a usable prompt" in found
    assert "the answer 'none' holds no finite number" in found


def test_a_column_that_a_verifier_reads_must_exist(refused):
    found = refused(GOOD, [{"kind": "number", "answer": "label"}], RewardError)
    assert "reads the column 'label', and the data has ['answer']" in found


def test_a_column_with_the_name_of_an_argument_is_refused(refused):
    found = refused([{"completions": "x"}], [{"kind": "regex", "pattern": "a"}], ConfigError, eval_size=0)
    assert "the column 'completions' has the name of an argument of rewards" in found
