import json

import pytest

from falign.data import BadRows, DataSource, Window, read_tokenized
from falign.errors import DataError
from tests.models.tiny import tiny_tokenizer

ROWS = [
    {"prompt": "a ", "completion": "one"},
    {"prompt": "b ", "completion": " "},
    {"prompt": "c ", "completion": "three, and more than fits"},
    {"prompt": "d ", "completion": "four"},
]


def read(path, **options):
    return read_tokenized(DataSource(str(path), chat=False), tiny_tokenizer(), stop_token_ids={1}, **options)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_rows_come_one_by_one_with_what_was_done_to_them(path):
    bad_rows = BadRows("skip")
    rows = list(read(path, window=Window(16, long_completion="drop"), bad_rows=bad_rows))
    assert [row.example.place for row in rows] == [f"{path}:{n}" for n in (1, 3, 4)]
    assert [row.tokenized.dropped for row in rows] == [None, "long completion", None]
    assert bad_rows.count == 1
    assert rows[0].tokenized.tree.completion_ids[0][-1] == 1


def test_a_bad_row_raises_when_it_is_reached(path):
    rows = read(path, window=Window(16))
    assert next(rows).example.place == f"{path}:1"
    with pytest.raises(DataError, match=r"rows.jsonl:2: 'completion' is empty"):
        next(rows)


def test_a_row_that_is_too_long_is_a_bad_row(path):
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[2]) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:3: .*max_length"):
        list(read(path, window=Window(16, long_completion="error")))
