"""A deadline ends what is late, in any thread, and leaves nothing behind."""

import os
import threading
import time
from pathlib import Path

import pytest

from falign.deadlines import LateError, failure, within


def loop():
    while True:
        pass


def test_a_loop_is_interrupted_in_any_thread():
    late = []

    def run():
        try:
            with within(0.1):
                loop()
        except LateError:
            late.append(threading.get_ident())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    run()
    for thread in threads:
        thread.join()
    assert len(set(late)) == 3


def test_what_is_done_in_time_is_left_alone():
    with within(0.1):
        pass
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        pass


def test_a_deadline_that_passes_at_the_last_moment_is_raised_in_its_block():
    with pytest.raises(LateError), within(0.1):
        time.sleep(1.2)


def test_a_function_that_returns_has_not_failed():
    assert failure(print, "nobody sees this", seconds=10.0) is None


def divide(number, by):
    return number / by


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (pow, (10, 10**9), "is not done after 0.2 s"),
        (loop, (), "is not done after 0.2 s"),
        (divide, (1, 0), "fails (ZeroDivisionError: division by zero)"),
        (bytes, (1 << 40,), "fails (it needs more than 2 GB of memory)"),
        (os._exit, (3,), "fails (exit status 3)"),
        (os.abort, (), "fails (exit status -6)"),
    ],
)
def test_what_became_of_a_call_is_told(function, arguments, message):
    assert failure(function, *arguments, seconds=0.2) == message


def children():
    """Return the processes of this one, those that have ended and were not collected included."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_no_process_and_no_file_is_left():
    before, others = len(list(Path("/proc/self/fd").iterdir())), children()
    failure(loop, seconds=0.1)
    failure(abs, -1, seconds=10.0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert children() <= others
