import json
import sqlite3
import time

import pytest

from falign.rewards.verifiers import RowError
from falign.rewards.verifiers.sql import extract_query, score

GOLD = "SELECT name FROM singer WHERE age > 20"
SETTINGS = {"seconds": 10.0, "max_rows": 10_000, "skip_empty": False}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "databases"
    folder.mkdir()
    connection = sqlite3.connect(folder / "concert.sqlite")
    connection.execute("CREATE TABLE singer (id INTEGER, name TEXT, age INTEGER, fee REAL)")
    connection.executemany(
        "INSERT INTO singer VALUES (?, ?, ?, ?)",
        [(1, "Ann", 30, 0.1), (2, "Bo", 25, 0.2), (3, "Cy", 20, 0.3), (4, "Bo", 40, 0.7)],
    )
    connection.commit()
    connection.close()
    (tmp_path / "outside.sqlite").write_bytes((folder / "concert.sqlite").read_bytes())
    return folder


def judge(root, completion, answer=GOLD, **options):
    return score(completion, answer, database="concert.sqlite", root=str(root), **{**SETTINGS, **options})


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("SELECT name FROM singer WHERE NOT age <= 20;", 1.0),
        ("SELECT name FROM singer WHERE age > 20 ORDER BY name DESC", 1.0),
        ("SELECT DISTINCT name FROM singer WHERE age > 20", 0.0),  # a multiset counts Bo twice
        ("SELECT name, age FROM singer WHERE age > 20", 0.0),
        ("SELECT name FROM singer", 0.0),
        ("SELECT nothing FROM singer", 0.0),
        ("I do not know.", 0.0),
        ("", 0.0),
        ("We filter by age.\n```sql\nSELECT name FROM singer WHERE age > 20\n```\nDone.", 1.0),
        ("First ```SELECT 1```, better:\nSELECT name\nFROM singer WHERE age > 20", 1.0),
        ("WITH old AS (SELECT * FROM singer WHERE age > 20) SELECT name FROM old", 1.0),
    ],
)
def test_what_the_queries_return_is_compared_as_a_multiset(root, completion, expected):
    assert judge(root, completion) == expected


def test_order_counts_where_the_rows_query_orders(root):
    gold = "SELECT name, age FROM singer ORDER  BY age"
    assert judge(root, "SELECT name, age FROM singer ORDER BY age ASC", gold) == 1.0
    assert judge(root, "SELECT name, age FROM singer ORDER BY age DESC", gold) == 0.0


def test_sums_in_another_order_are_equal(root):
    gold = "SELECT sum(fee) FROM (SELECT fee FROM singer ORDER BY fee)"
    assert judge(root, "SELECT 0.7 + 0.3 + 0.2 + 0.1", gold) == 1.0
    assert judge(root, "SELECT 1.300001", gold) == 0.0


def test_an_empty_result_is_compared_or_does_not_apply(root):
    gold = "SELECT name FROM singer WHERE age > 90"
    assert judge(root, "SELECT name FROM singer WHERE age > 99", gold) == 1.0
    assert judge(root, "SELECT name FROM singer WHERE age > 99", gold, skip_empty=True) is None


@pytest.mark.parametrize(
    "completion",
    [
        "DELETE FROM singer",
        "DROP TABLE singer",
        "CREATE TEMP TABLE t (x)",
        "PRAGMA writable_schema = 1",
        "SELECT name FROM pragma_table_info('singer')",
        "ATTACH DATABASE 'file:new.sqlite?mode=rwc' AS other",
        "VACUUM INTO 'copy.sqlite'",
        "SELECT load_extension('x.so')",
        f"{GOLD}; DELETE FROM singer",
        f"{GOLD}; {GOLD}",
    ],
)
def test_a_query_that_does_more_than_read_fails_and_changes_nothing(root, completion, monkeypatch):
    monkeypatch.chdir(root)
    before = (root / "concert.sqlite").read_bytes()
    assert judge(root, completion) == 0.0
    assert (root / "concert.sqlite").read_bytes() == before
    assert [file.name for file in root.iterdir()] == ["concert.sqlite"]


@pytest.mark.parametrize("database", ["../outside.sqlite", "/etc/passwd", "link.sqlite", "none.sqlite"])
def test_a_database_outside_the_folder_or_missing_is_the_rows_fault(root, database):
    (root / "link.sqlite").symlink_to(root.parent / "outside.sqlite")
    with pytest.raises(RowError, match=r"is not inside|there is no database"):
        score(GOLD, GOLD, database=database, root=str(root), **SETTINGS)


def test_a_query_of_the_row_that_fails_is_the_rows_fault(root):
    with pytest.raises(RowError, match=r"the query of the row fails on concert.sqlite: no such column: title"):
        judge(root, GOLD, "SELECT title FROM singer")
    with pytest.raises(RowError, match="more than max_rows=2 rows"):
        judge(root, GOLD, max_rows=2)


@pytest.mark.parametrize(
    "bomb",
    [
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        "SELECT count(*) FROM singer " + " ".join(f"CROSS JOIN singer AS s{i}" for i in range(20)),
    ],
    ids=["endless recursion", "cartesian product"],
)
def test_a_bomb_is_stopped_at_its_time(root, bomb):
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"more than 0.3 s"):
        judge(root, bomb, seconds=0.3)
    assert time.monotonic() - begin < 5.0


def test_endless_rows_are_not_read_to_the_end(root):
    assert judge(root, "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n") == 0.0


def test_a_value_of_gigabytes_is_refused(root):
    assert judge(root, "SELECT length(zeroblob(999999999)) || hex(zeroblob(999999999))") == 0.0


def test_text_that_is_not_utf8_is_read(root):
    assert judge(root, "SELECT CAST(x'41ff' AS TEXT)", "SELECT CAST(x'41ff' AS TEXT) WHERE 1") == 1.0


def test_extracting_a_query():
    assert extract_query("```sql\nSELECT 1\n```\nor\n```\nSELECT 2\n```") == "SELECT 2"
    assert extract_query("Sure!\n  select 3;") == "select 3;"


def test_the_queries_of_spider_return_what_the_data_says_and_equal_themselves(shared_data):
    folder = shared_data("spider-sql")
    root = str(folder / "databases")
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert len(questions) == 696
    others = {question["db_id"]: question for question in questions}  # the last of each database
    told_apart = 0
    for question in questions:
        database, gold = f"{question['db_id']}.sqlite", question["query"]
        value = score(gold, gold, database=database, root=root, **{**SETTINGS, "skip_empty": True})
        assert value == (1.0 if question["gold_rows"] else None), question
        other = others[question["db_id"]]["query"]
        told_apart += score(other, gold, database=database, root=root, **SETTINGS) == 0.0
    # A wrong query may return the right rows by chance, and each database's last query is right on itself.
    assert told_apart == 666


def test_a_link_out_of_the_folder_is_the_rows_fault(root):
    (root / "link.sqlite").symlink_to(root.parent / "outside.sqlite")
    with pytest.raises(RowError, match="is not inside"):
        score(GOLD, GOLD, database="link.sqlite", root=str(root), **SETTINGS)
