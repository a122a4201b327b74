import json

import pytest

from falign.data import DataSource, Window
from falign.errors import DataError
from falign.evaluation import TreeStream, batches_in_order
from falign.scoring import PromptTree
from tests.models.tiny import tiny_tokenizer

ROWS = [
    {"prompt": "a ", "completion": "one"},
    {"prompt": "b ", "completion": " "},
    {"prompt": "c ", "completion": "three, and more than fits"},
    {"prompt": "d ", "completion": "four"},
]


@pytest.fixture
def stream(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def of(**options):
        return TreeStream(DataSource(str(path), chat=False), tiny_tokenizer(), stop_token_ids={1}, **options)

    return of


def test_what_is_not_scored_as_it_stands_is_counted(stream):
    trees = stream(window=Window(16), bad_rows="skip")
    assert [tree.place.rpartition(":")[2] for tree in trees] == ["1", "3", "4"]
    assert trees.counts() == [("bad rows", 1), ("completions cut", 1)]
    trees = stream(window=Window(16, long_completion="drop"), bad_rows="skip")
    assert len(list(trees)) == 2
    assert trees.counts() == [("bad rows", 1), ("dropped: long completion", 1)]


def test_rows_are_read_as_they_are_asked_for(stream):
    trees = iter(stream(window=Window(16)))
    assert next(trees).completion_ids[0][-1] == 1
    with pytest.raises(DataError, match=r"rows.jsonl:2: 'completion' is empty"):
        next(trees)


def test_batches_keep_the_order_and_the_budget():
    trees = [PromptTree((5, 5), ((6,) * n, (7,) * n)) for n in (1, 4, 2, 9, 1, 1)]
    batches = list(batches_in_order(trees, max_tokens=14))
    assert [tree for batch in batches for tree in batch] == trees
    assert [[tree.num_tokens for tree in batch] for batch in batches] == [[4, 10], [6], [20], [4, 4]]
    assert list(batches_in_order([], max_tokens=14)) == []


def test_batches_do_not_read_ahead_more_than_one_tree():
    read = []

    def trees():
        for n in range(6):
            read.append(n)
            yield PromptTree((5,), ((6,),))

    batches = batches_in_order(trees(), max_tokens=4)
    next(batches)
    assert read == [0, 1, 2]
