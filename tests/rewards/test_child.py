import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from falign.errors import RewardError
from falign.rewards.child import Call, ChildPool

PLAIN = "tests.rewards.plain"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pool():
    pool = ChildPool(num_workers=2, memory_bytes=1 << 30)
    yield pool
    pool.close()


def call(function, timeout=20.0, **arguments):
    return Call(f"{PLAIN}:{function}", arguments, timeout)


def alive(pid):
    """A killed process whose parent is gone may remain as a zombie that nobody collects."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until_dead(pid, seconds):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def test_values_come_in_the_order_of_the_calls(pool):
    outcomes = pool.run([call("square", x=x) for x in range(50)])
    assert [outcome.value for outcome in outcomes] == [x * x for x in range(50)]
    assert {outcome.kind for outcome in outcomes} == {"value"}
    assert pool.run([]) == []


def test_processes_stay_between_rounds_and_never_import_torch(pool):
    (first,), (second,) = pool.run([call("pid")]), pool.run([call("pid")])
    assert first.value == second.value != os.getpid()
    (loaded,) = pool.run([call("loaded")])
    assert not {"torch", "numpy", "transformers", "falign"} & set(loaded.value)


def test_a_hung_call_is_killed_and_the_others_have_their_values(pool):
    begin = time.monotonic()
    outcomes = pool.run([call("add", x=1), call("hang", timeout=0.5), call("add", x=2), call("add", x=3)])
    assert time.monotonic() - begin < 10
    assert [outcome.kind for outcome in outcomes] == ["value", "timeout", "value", "value"]
    assert outcomes[1].message == "killed after 0.5 s"
    assert [outcome.value for outcome in outcomes] == [1, None, 2, 3]


def test_a_call_that_never_looks_at_signals_is_killed_too(pool):
    pathological = Call("re:fullmatch", {"pattern": r"(a+)+b", "string": "a" * 40}, 0.5)
    assert pool.run([pathological])[0].kind == "timeout"
    assert pool.run([call("add", x=1)])[0].value == 1


def test_an_exception_is_an_error_with_its_message_and_a_timeout_error_is_a_timeout(pool):
    raised, timed_out = pool.run([call("raises", message="here"), call("times_out")])
    assert (raised.kind, raised.error, raised.message) == ("error", "KeyError", "KeyError: 'here'")
    assert (timed_out.kind, timed_out.message) == ("timeout", "TimeoutError: too long")


def test_a_process_that_dies_costs_its_own_call_alone(pool):
    outcomes = pool.run([call("leaves", status=3), call("add", x=1), call("add", x=2)])
    assert [outcome.kind for outcome in outcomes] == ["error", "value", "value"]
    assert outcomes[0].message == "its process died (exit status 3)"


def test_a_process_killed_between_two_rounds_is_replaced(pool):
    outcomes = pool.run([call("pid"), call("pid")])
    for pid in {outcome.value for outcome in outcomes}:
        os.kill(pid, signal.SIGKILL)
    for worker in pool._workers:
        worker.process.wait(5)  # which supervises the killed one, and outlives all of its threads
    assert pool.run([call("add", x=5)])[0].value == 5


def test_memory_is_limited_and_what_held_it_is_replaced(pool):
    (before,) = pool.run([call("pid")])
    big, small = pool.run([call("allocates", size=2 << 30)])[0], pool.run([call("allocates", size=1 << 20)])[0]
    assert (big.kind, big.error) == ("error", "MemoryError")
    assert small.value == 1 << 20
    assert not alive(before.value)


def test_what_a_call_prints_is_not_taken_for_its_answer(pool):
    assert pool.run([call("prints", text='{"value": 7}')])[0].value == 12


def test_it_works_off_the_main_thread_and_in_several_at_once(pool):
    found = {}

    def work(x):
        found[x] = [outcome.value for outcome in pool.run([call("square", x=x), call("square", x=-x)])]

    threads = [threading.Thread(target=work, args=(x,)) for x in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {x: [x * x, x * x] for x in range(4)}


def test_a_function_that_cannot_be_imported_stops_with_its_reason(pool):
    with pytest.raises(RewardError, match=r"tests.rewards.plain:nothing cannot be imported .*AttributeError"):
        pool.run([call("add", x=1), call("nothing")])
    with pytest.raises(RewardError, match="ModuleNotFoundError"):
        pool.run([Call("no_such_module:f", {}, 1.0)])
    assert pool.run([call("add", x=1)])[0].value == 1


def test_an_argument_that_does_not_pickle_is_refused(pool):
    with pytest.raises(RewardError, match="cannot be sent to another process"):
        pool.run([call("square", x=lambda: 1)])
    assert pool.run([call("add", x=1)])[0].value == 1


def test_imports_have_a_deadline_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(0.5)\ndef f(): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = ChildPool(num_workers=1)
    assert pool.run([Call("slow_module:f", {}, 0.2)])[0].value == 1
    pool.close()
    pool = ChildPool(num_workers=1, start_timeout=0.2)
    with pytest.raises(RewardError, match=r"slow_module:f was not imported within 0.2 s"):
        pool.run([Call("slow_module:f", {}, 0.2)])


def test_closing_ends_the_processes_and_a_later_call_starts_new_ones():
    pool = ChildPool(num_workers=1)
    (first,) = pool.run([call("pid")])
    pool.close()
    assert not alive(first.value)
    (second,) = pool.run([call("pid")])
    assert second.value != first.value
    del pool
    assert until_dead(second.value, 5)


STARTED = ["in its own session", "in its group", "a fork"]


@pytest.mark.parametrize("how", STARTED)
@pytest.mark.parametrize("end", ["dies", "hangs", "returns"])
def test_what_a_call_has_started_ends_with_its_process(how, end, tmp_path):
    pool = ChildPool(num_workers=1, memory_bytes=None)
    (outcome,) = pool.run(
        [call("starts", timeout=1.0 if end == "hangs" else 20.0, file=tmp_path / "p", how=how, end=end)]
    )
    assert outcome.kind == {"dies": "error", "hangs": "timeout", "returns": "value"}[end]
    started = int((tmp_path / "p").read_text())
    pool.close()
    assert until_dead(started, 5)


def test_nothing_is_left_when_the_run_is_killed(tmp_path):
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from threading import Thread
        from falign.rewards.child import Call, ChildPool
        pools = [ChildPool(num_workers=1, memory_bytes=None, confined=i == 1) for i in range(3)]
        pids = [pool.run([Call("tests.rewards.plain:pid", {{}}, 1.0)])[0].value for pool in pools]
        print(*pids, flush=True)
        held = Call("re:fullmatch", {{"pattern": "(a+)+b", "string": "a" * 60}}, 600.0)
        arguments = {{"file": Path({str(tmp_path / "p")!r}), "how": "in its own session", "end": "hangs"}}
        started = Call("tests.rewards.plain:starts", arguments, 600.0)
        for pool, work in zip(pools, (held, started), strict=False):
            Thread(target=pools[0 if work is held else 2].run, args=([work],), daemon=True).start()
        sys.stdin.read()
    """)
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    children = list(map(int, parent.stdout.readline().split()))
    supervisors = [int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1]) for child in children]
    end = time.monotonic() + 20
    while not (tmp_path / "p").exists() and time.monotonic() < end:
        time.sleep(0.05)
    processes = [*children, *supervisors, int((tmp_path / "p").read_text())]
    assert all(map(alive, processes))
    parent.kill()
    parent.communicate()
    assert all(until_dead(process, 10) for process in processes)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_copy_of_the_pool_has_processes_of_its_own(pool):
    (mine,) = pool.run([call("pid")])
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, str(pool.run([call("pid")])[0].value).encode())
        pool.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reading, 20)) != mine.value
    assert pool.run([call("pid")])[0].value == mine.value
    os.close(reading), os.close(writing)
