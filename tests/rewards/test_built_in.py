import json
import re
import time

import pytest

from falign.errors import RewardError
from falign.rewards import ChildPool, ScoringReward, Verifier, choice, mathematics, number, regex, sections, sql


@pytest.fixture(scope="module")
def pool():
    pool = ChildPool(num_workers=2, memory_bytes=2 << 30)
    yield pool
    pool.close()


def replaced(verifier, pool):
    from dataclasses import replace

    return replace(verifier, pool=pool)


def prompts(completions):
    return ["p"] * len(completions)


@pytest.mark.parametrize(
    ("verifier", "columns", "completions", "expected"),
    [
        (mathematics(), {"answer": ["1/2", "#### 7"]}, [r"\boxed{0.5}", "8"], [1.0, 0.0]),
        (number(answer="value", tolerance=0.1), {"value": [10, 10]}, ["10.9", "11.1"], [1.0, 0.0]),
        (choice(letters="AB"), {"answer": ["A", "A"]}, ["Answer: A", "Answer: B"], [1.0, 0.0]),
        (choice(options="options"), {"answer": ["B"], "options": [["A)3", "B)4"]]}, ["4"], [1.0]),
        (regex(r"^\d+$"), {}, ["12", "x"], [1.0, 0.0]),
        (regex(r"=(\d)", answer="answer"), {"answer": ["4", "4"]}, ["=4", "=5"], [1.0, 0.0]),
        (sections(["a"]), {}, ["<a>x</a>", "x"], [1.0, 0.0]),
    ],
    ids=["math", "number", "choice", "options", "regex", "regex with answer", "sections"],
)
def test_each_verifier_judges_in_a_process_of_its_own(verifier, columns, completions, expected, pool):
    verifier = replaced(verifier, pool)
    assert isinstance(verifier, ScoringReward)
    assert verifier(prompts(completions), completions, unused=[0] * len(completions), **columns) == expected


def test_sql_takes_its_file_from_a_column(shared_data, pool):
    folder = shared_data("spider-sql")
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()][:40]
    verifier = replaced(sql(folder / "databases"), pool)
    columns = {"db_id": [row["db_id"] for row in rows], "query": [row["query"] for row in rows]}
    assert verifier(prompts(rows), [f"```sql\n{row['query']}\n```" for row in rows], **columns) == [1.0] * 40
    assert verifier(prompts(rows), ["SELECT 'wrong'"] * 40, **columns) == [0.0] * 40
    with pytest.raises(RewardError, match=r"reward sql, completion 0: the database '../x.sqlite' is not inside"):
        verifier(["p"], ["SELECT 1"], db_id=["../x"], query=["SELECT 1"])


def test_what_hangs_is_killed_scored_as_failed_and_counted(pool):
    hung = replaced(regex(r"(a+)+b", timeout=0.5, failed=-1.0), pool)
    scores = hung.score(prompts("123"), ["ab", "a" * 40, "c"], place=["r:1", "r:2", "r:3"])
    assert scores == ([1.0, -1.0, 0.0], 1, 0, "reward regex, r:2: killed after 0.5 s", {})
    left_out = replaced(regex(r"(a+)+b", timeout=0.5, failed=None), pool)
    assert left_out(["p"], ["a" * 40]) == [None]


@pytest.mark.parametrize("expression", ["9^{9^{9^{9}}}", r"\frac{10^{10^{10}}!}{3!}"])
def test_a_pathological_expression_is_killed_at_its_deadline(expression, pool):
    begin = time.monotonic()
    scores = replaced(mathematics(timeout=1.0), pool).score(
        prompts("12"), [rf"\boxed{{{expression}}}", "7"], answer=["7", "7"]
    )
    assert time.monotonic() - begin < 15
    assert scores.values == [0.0, 1.0]
    assert scores.timeouts + scores.errors == 1


def test_a_query_that_does_not_end_gives_up_before_its_process_is_killed(tmp_path, pool):
    import sqlite3

    sqlite3.connect(tmp_path / "d.sqlite").close()
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    scores = replaced(sql(tmp_path, database="d.sqlite", timeout=0.5), pool).score(["p"], [endless], query=["SELECT 1"])
    assert scores[:3] == ([0.0], 1, 0)
    assert scores.message.endswith("TimeoutError: the queries took more than 0.4 s")


def test_an_exception_is_failed_and_counted_and_an_unusable_row_stops(pool):
    own = Verifier("own", "tests.rewards.plain:by_content", pool=pool)
    bad = own.score(["p"], ["raise"])
    assert bad[:3] == ([0.0], 0, 1)
    assert bad.message.startswith("reward own, completion 0: ValueError: told to")
    with pytest.raises(RewardError, match=r"reward number, rows.jsonl:8: the answer 'x' holds no finite number. Fix"):
        replaced(number(), pool)(["p"], ["3"], answer=["x"], place=["rows.jsonl:8"])


def test_a_missing_column_is_named_with_those_that_there_are(pool):
    with pytest.raises(RewardError, match=r"reward number reads the column 'answer', and the data has \['label'\]"):
        replaced(number(), pool)(["p"], ["3"], label=["3"])
    with pytest.raises(RewardError, match=r"reward sql reads the column 'db_id'"):
        replaced(sql("."), pool)(["p"], ["3"], query=["3"])


def test_a_verifier_of_ones_own_may_say_that_it_does_not_apply(pool):
    own = Verifier("own", "tests.rewards.plain:by_content", timeout=0.5, pool=pool)
    assert own.score(prompts("123"), ["x", "hang", "raise"])[:3] == ([1.0, 0.0, 0.0], 1, 1)


def test_a_template_reads_whole_columns_only_and_one_that_cannot_be_read_is_refused_at_once(tmp_path, pool):
    within = replaced(sql(tmp_path, database="{answer.__class__}.sqlite"), pool)
    with pytest.raises(RewardError, match=r"reads the column 'answer.__class__', and the data has \['answer'\]"):
        within.score(["p"], ["SELECT 1"], answer=["SELECT 1"])
    for database, reason in (("{db", "expected '}'"), ("{0}", "it has braces without the name of a column")):
        with pytest.raises(ValueError, match=re.escape(f"database='{database}' cannot be read ({reason}")):
            sql(tmp_path, database=database)
