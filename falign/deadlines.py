"""Deadlines for foreign code (chat templates, regular expressions), in this process and in a child process."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["LateError", "end_with_parent", "failure", "within"]


MEMORY_BYTES = 2 << 30
"""The memory that a child process may use beyond that of its parent; enforced on Linux only."""

_TICK = 0.5


class LateError(Exception):
    """Code that is still running at its deadline."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise ``LateError`` in a block that runs longer, in any thread.

    It is raised between two steps of Python: one long operation in C is not interrupted. :func:`failure` ends those.
    """
    thread = threading.get_ident()
    _watcher.watch(thread, time.monotonic() + seconds)
    try:
        yield
    finally:
        if _watcher.ends.pop(thread, None) is None and not isinstance(sys.exc_info()[1], LateError):
            time.sleep(_TICK)  # an error that is already sent must not arrive after the block


class _Watcher:
    """A thread that interrupts others at their deadlines.

    Attributes:
        ends: When each thread must have left its block.
    """

    def __init__(self) -> None:
        self.ends: dict[int, float] = {}
        self._thread = threading.Thread()

    def watch(self, thread: int, end: float) -> None:
        self.ends[thread] = end
        if not self._thread.is_alive():  # also after a fork, which copies no other thread
            self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(_TICK)
            for thread in [thread for thread, end in list(self.ends.items()) if time.monotonic() > end]:
                if self.ends.pop(thread, None) is not None:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(LateError))


_watcher = _Watcher()


def failure(function: Callable[..., object], *arguments: Any, seconds: float) -> str | None:
    """Call a function in a copy of this process, which is killed at a deadline.

    Args:
        function: The function. Neither what it returns nor what it changes is seen here.
        arguments: The function's.
        seconds: How long it may take.

    Returns:
        None where it returned; else what became of it, as the end of a sentence.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    with warnings.catch_warnings():
        # The copy might block on locks of other threads; but it runs only this function, and has a deadline.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _call_and_exit(function, arguments, writer, parent)
    os.close(writer)
    try:
        message = _read_to_end(reader, seconds)
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)  # no effect if it has ended
        _, status = os.waitpid(child, 0)
    if message is None:
        return f"is not done after {seconds:g} s"
    code = os.waitstatus_to_exitcode(status)
    if not message and code == 0:
        return None
    return f"fails ({message or f'exit status {code}'})"


def _call_and_exit(function: Callable[..., object], arguments: tuple[Any, ...], writer: int, parent: int) -> NoReturn:
    try:
        end_with_parent(parent)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        _limit_memory()
        function(*arguments)
        message = ""
    except MemoryError:
        message = f"it needs more than {MEMORY_BYTES >> 30} GB of memory"
    except BaseException as error:  # a panic in a Rust library is not an Exception
        message = f"{type(error).__name__}: {error}"
    try:
        os.write(writer, message.encode("utf-8", "backslashreplace"))
    finally:
        os._exit(0)


def _limit_memory() -> None:
    import resource

    sizes = Path("/proc/self/statm")
    if sizes.is_file():
        now = int(sizes.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))


def _read_to_end(reader: int, seconds: float) -> str | None:
    """Return all data until the writer closes; None after the deadline."""
    end, content = time.monotonic() + seconds, b""
    while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(reader, 1 << 16)
        if not part:
            return content.decode("utf-8", "replace")
        content += part
    return None


PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when its parent ends; only on Linux, because others have no such signal.

    Args:
        parent: The process that started this one. Where it is gone already, this one ends at once.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)
