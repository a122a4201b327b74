"""Stored completions of the reference are read whole, or refused by row."""

import json

import pytest

from falign.errors import DataError
from falign.training.online.rehearsal_file import read_rehearsal

ROW = {"prompt_ids": [40, 41], "completion_ids": [70, 1], "logprobs": [-5.0, -4]}


@pytest.fixture
def read(tmp_path):
    def of(**changes):
        file = tmp_path / "rehearsal.jsonl"
        file.write_text(json.dumps({**ROW, **changes}) + "\n", encoding="utf-8")
        return read_rehearsal(str(file), num_tokens=100)

    return of


def test_a_row_becomes_a_tree_with_what_the_reference_said(read):
    found = read()
    (tree,) = found.trees
    assert (tree.prompt_ids, tree.completion_ids) == ((40, 41), ((70, 1),))
    assert found.values("reference_logprobs").tolist() == [[-5.0, -4.0]]
    assert found.values("from_reference").tolist() == [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": [-5.0, float("nan")]}, "nan in 'logprobs' is not the logarithm of a probability"),
        ({"logprobs": [-5.0, float("-inf")]}, "-inf in 'logprobs'"),
        ({"logprobs": [-5.0, 3.0]}, "3.0 in 'logprobs'"),
        ({"logprobs": [-5.0]}, "1 logprobs for 2 completion_ids"),
        ({"completion_ids": [70, 100]}, "token id 100 is not among the tokenizer's 100"),
        ({"prompt_ids": [-1]}, "token id -1 is not among"),
        ({"completion_ids": [True, 1]}, "'completion_ids' is not a list of numbers"),
        ({"completion_ids": []}, "'completion_ids' is not a list of numbers"),
    ],
)
def test_a_damaged_row_is_named(read, changes, message):
    with pytest.raises(DataError, match=rf"rehearsal.jsonl:1: .*{message}"):
        read(**changes)
