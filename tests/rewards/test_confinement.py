"""What a verifier's process may not do, tried in a pool like the one that verifiers share."""

import sqlite3
import time

import pytest

from falign.rewards import Call, ChildPool, Verifier, shared_pool
from falign.rewards.child import KEPT_VARIABLES
from tests.rewards import attempts


@pytest.fixture(scope="module")
def pool():
    pool = ChildPool(num_workers=1, confined=True)
    yield pool
    pool.close()


ATTEMPTS = sorted(name for name in vars(attempts) if name.startswith("try_"))


def test_the_pool_that_verifiers_share_is_confined():
    assert shared_pool().confined


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_verifier_cannot(attempt, pool, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    before = file.stat()
    (outcome,) = pool.run([Call(f"{attempts.__name__}:{attempt}", {"completion": str(file)}, 30.0)])
    assert outcome.error in {"PermissionError", "OperationalError", "URLError"}, outcome
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (0, before.st_mtime_ns)


def test_a_completion_that_is_evaluated_cannot_get_out_by_imports(pool, tmp_path):
    command = f"__import__('os').system('touch {tmp_path / 'out'}')"
    verifier = Verifier("own", f"{attempts.__name__}:evaluate", timeout=30.0, pool=pool)
    scores = verifier.score([""], [command])
    assert (scores.values, scores.errors) == ([0.0], 1)
    assert "PermissionError: os.system" in scores.message
    assert not list(tmp_path.iterdir())


def test_a_verifier_can_read(pool, tmp_path):
    (tmp_path / "file").write_text("mine")
    (outcome,) = pool.run([Call(f"{attempts.__name__}:reads", {"completion": str(tmp_path / "file")}, 30.0)])
    assert outcome.value == 1.0


def test_a_query_that_sorts_more_than_sqlite_keeps_in_memory_has_its_rows(pool, tmp_path):
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 90000)"
    texts = "SELECT printf('%0200d', i * 7919 % 90001) AS text FROM n ORDER BY text LIMIT -1 OFFSET 5"
    query = f"{numbers} SELECT count(*) FROM ({texts})"
    arguments = {"completion": query, "answer": query, "database": "empty.sqlite", "root": str(tmp_path)}
    settings = {"seconds": 60.0, "max_rows": 10_000, "skip_empty": False}
    (outcome,) = pool.run([Call("falign.rewards.verifiers.sql:score", arguments | settings, 90.0)])
    assert outcome.value == 1.0, outcome


def ask(pool, function, timeout=10.0, count=1, **arguments):
    return pool.run([Call(f"{attempts.__name__}:{function}", {"completion": "", **arguments}, timeout)] * count)


@pytest.mark.parametrize("how", ["whole frame", "half a frame", "a long frame", "noise"])
def test_an_answer_that_is_forged_costs_its_own_call_and_no_other(how, pool):
    (forged,) = ask(pool, "forges", how=how)
    assert (forged.kind, forged.error) == ("error", "ProcessDied")
    assert forged.message == "its process wrote something other than one reply"
    assert [outcome.value for outcome in ask(pool, "number_in_reach", count=3)] == [0, 0, 0]


def test_half_a_frame_does_not_hold_the_run_beyond_the_deadline(pool):
    begin = time.monotonic()
    (outcome,) = ask(pool, "half_a_frame_and_hang", timeout=0.5)
    assert time.monotonic() - begin < 5
    assert outcome.kind in {"timeout", "error"}


def test_a_thread_that_a_call_leaves_does_not_reach_the_next_one(pool):
    (before,) = ask(pool, "pid")
    (forger,) = ask(pool, "forges_later")
    assert forger.value == 0.0 or forger.error == "ProcessDied"  # where the thread was faster than the answer
    outcomes = ask(pool, "pid", count=5)
    assert {outcome.kind for outcome in outcomes} == {"value"}
    assert before.value not in {outcome.value for outcome in outcomes}


def test_the_environment_is_empty_but_for_what_python_needs(pool, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    other = ChildPool(num_workers=1, confined=True)
    (outcome,) = ask(other, "environment")
    other.close()
    assert set(outcome.value) <= {*KEPT_VARIABLES, "LC_CTYPE"}  # the last is set by Python itself
