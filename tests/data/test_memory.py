"""Rows in memory give the examples that the same rows give from a file."""

import json

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from falign.data import DataSource, InMemory, PromptSource, load_prompts, read_examples, read_rows
from falign.errors import DataError
from tests.models.tiny import tiny_tokenizer

PAIRS = [
    {"prompt": "Say no.", "chosen": "No, thank you.", "rejected": "No."},
    {"prompt": "Say yes.", "chosen": "Yes, please.", "rejected": "Yes."},
]
TURNS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in PAIRS
]


def examples(source):
    return [(each.prompt, each.completions, each.preference) for each in read_examples(source)]


@pytest.mark.parametrize(
    "make", [list, tuple, Dataset.from_list, pd.DataFrame], ids=["list", "tuple", "Dataset", "frame"]
)
@pytest.mark.parametrize("rows", [PAIRS, TURNS], ids=["plain", "turns"])
def test_rows_in_memory_are_read_as_those_of_a_file(tmp_path, make, rows):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = InMemory(make(rows))
    source = DataSource(held.path, rows=held)
    assert examples(source) == examples(DataSource(str(file)))
    assert examples(source) == examples(source), "they are read more than once"


def test_missing_values_of_a_frame_are_none():
    held = InMemory(pd.DataFrame({"prompt": ["one", "two"], "system": ["Be brief.", None], "score": [1.0, None]}))
    assert [row.fields for row in held.read()][1] == {"prompt": "two", "system": None, "score": None}


def test_a_bad_row_is_named_by_its_type_and_number():
    held = InMemory([*PAIRS, "a text"])
    with pytest.raises(DataError, match=r"python:list row 3: the row is 'a text'"):
        list(held.read())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (DatasetDict({"train": Dataset.from_list(PAIRS)}), r"its keys are \['train'\]: give one of them"),
        ("pairs.jsonl", "rows are a Dataset"),
        ((row for row in PAIRS), "make a list of it"),
        (pd.DataFrame({"prompt": ["one", 2]}), "make them one type"),
    ],
    ids=["splits", "path", "generator", "types"],
)
def test_what_holds_no_rows_is_refused_with_the_remedy(values, said):
    with pytest.raises(DataError, match=said):
        InMemory(values)


def test_prompts_in_memory_keep_their_columns():
    held = InMemory(Dataset.from_list([{"question": "2 + 2 =", "answer": "4"}]))
    source = PromptSource(held.path, rows=held, template="{question}", chat=False)
    row = load_prompts([source], tiny_tokenizer(), max_length=32).train[0]
    assert (row.prompt, row.columns["answer"], row.place) == ("2 + 2 =", "4", "python:Dataset row 1")


def test_rows_that_are_gone_are_asked_for_again():
    with pytest.raises(DataError, match="was an object in a program"):
        list(read_rows("python:Dataset"))
