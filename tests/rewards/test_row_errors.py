"""Every verifier says before any completion is there which rows it cannot judge."""

import sqlite3

import pytest

from falign.errors import ConfigError, RewardError
from falign.rewards import (
    ChildPool,
    RewardSum,
    Verifier,
    WeightedReward,
    Words,
    choice,
    mathematics,
    number,
    regex,
    sections,
    sql,
)
from falign.rewards.base import RowReward


@pytest.fixture(scope="module")
def pool():
    pool = ChildPool(num_workers=1)
    yield pool
    pool.close()


def errors(verifier, pool, **columns):
    from dataclasses import replace

    verifier = replace(verifier, pool=pool) if isinstance(verifier, Verifier) else verifier
    assert isinstance(verifier, RowReward)
    count = len(next(iter(columns.values())))
    return verifier.row_errors(["p"] * count, **columns)


BAD = [None, float("nan"), "none", "tower", ""]


@pytest.mark.parametrize(
    ("verifier", "good", "bad"),
    [
        (mathematics(), ["1/2", 7, "#### 7"], BAD),
        (number(), [5, "#### 1,000"], [*BAD, "1/2"]),
        (choice(), ["A", "(b)"], [*BAD, 1, "1"]),
        (regex(r"(\d)", answer="answer"), [4, "none", "yes"], [None, float("nan"), "", ["a"]]),
        (Words(column="answer"), ["a b", ["c"]], [None, float("nan"), "", [], [1]]),
    ],
    ids=["math", "number", "choice", "regex", "words"],
)
def test_rows_that_cannot_be_judged_are_told_from_those_that_can(verifier, good, bad, pool):
    found = errors(verifier, pool, answer=[*good, *bad])
    assert found[: len(good)] == [None] * len(good)
    assert all(isinstance(reason, str) and reason for reason in found[len(good) :]), found


def test_sql_reads_the_database_and_the_query_of_each_row(tmp_path, pool):
    connection = sqlite3.connect(tmp_path / "d.sqlite")
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    (tmp_path / "damaged.sqlite").write_bytes(b"no database" * 100)
    verifier = sql(tmp_path)
    names = ["d", "d", "d", "damaged", "nowhere", None, "d\0", "../d", "x" * 5000]
    queries = ["SELECT x FROM t", None, "SELECT y FROM t", *["SELECT 1"] * 6]
    found = errors(verifier, pool, db_id=names, query=queries)
    assert found[0] is None
    for reason, part in zip(
        found[1:],
        [
            "the query of the row is None",
            "the query of the row fails on d.sqlite: no such column: y",
            "file is not a database",
            "there is no database 'nowhere.sqlite'",
            "the column 'db_id', which '{db_id}.sqlite' needs, is missing",
            "cannot be opened",
            "is not inside",
            "cannot be opened",
        ],
        strict=True,
    ):
        assert reason is not None
        assert part in reason


def test_rewards_without_a_column_accept_every_row(pool):
    for verifier in (regex("a"), sections(["a"]), Words(["a"])):
        assert errors(verifier, pool, other=[None, 1]) == [None, None]


def test_a_sum_names_the_reward_and_a_missing_column_stops(pool):
    rewards = RewardSum((WeightedReward("words", Words(column="w")), WeightedReward("right", number())))
    found = rewards.row_errors(["p"] * 3, w=["a", None, "b"], answer=["1", "2", "x"])
    assert found[0] is None
    assert found[1] == "reward words: column 'w' is None; it must hold words, at least one"
    assert found[2] == "reward right: the answer 'x' holds no finite number"
    with pytest.raises(RewardError, match=r"reads the column 'answer', and the data has \['label', 'w'\]"):
        rewards.row_errors(["p"], w=["a"], label=["1"], place=["r:1"], prompt_ids=[[1]])


def test_a_verifier_of_ones_own_is_asked_too_and_its_other_errors_are_not_the_rows(pool):
    own = Verifier("own", "tests.rewards.plain:needs_content", columns={"level": "level"}, pool=pool)
    assert own.row_errors(["p"] * 3, level=[1, None, 2]) == [None, "no level", None]


@pytest.mark.parametrize(("pattern", "answer"), [("(", None), (r"\d", "answer")])
def test_a_pattern_that_cannot_work_is_refused_when_it_is_made(pattern, answer):
    with pytest.raises(ConfigError, match="reward regex: the pattern"):
        regex(pattern, answer=answer)
