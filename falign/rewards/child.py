"""Calls in processes that can be killed: each has a deadline, and none can take the run with it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from falign.errors import RewardError

__all__ = ["DEFAULT_MEMORY_BYTES", "Call", "ChildPool", "Outcome", "shared_pool"]

DEFAULT_MEMORY_BYTES = 4 << 30
WORKER = Path(__file__).with_name("worker.py")


class Call(NamedTuple):
    """One call.

    Attributes:
        function: ``module:function``, importable in a process that has this one's ``sys.path``.
        arguments: By name; they must pickle.
        timeout: Seconds until it is killed. Imports do not count.
    """

    function: str
    arguments: Mapping[str, Any]
    timeout: float


class Outcome(NamedTuple):
    """What became of a call.

    Attributes:
        kind: ``value``: it returned; ``timeout``: it was killed at its deadline, or raised TimeoutError; ``error``: it
            raised, or its process died.
        value: What it returned, as JSON knows it.
        error: The name of the exception's class, ``""`` where there is none.
        message: What a person should read.
    """

    kind: Literal["value", "timeout", "error"]
    value: Any = None
    error: str = ""
    message: str = ""


class ChildPool:
    """A few processes that stay, started when they are first needed.

    A process whose call passes its deadline is killed and replaced, so code that never looks at a signal (a regular
    expression, a symbolic simplification) is ended too. It may be used from any thread. The processes end with this
    one, however it ends.

    Args:
        num_workers: How many calls run at once; by default one per core, at most 8.
        memory_bytes: Address space of each process; None does not limit it.
        start_timeout: Seconds that importing a function may take.
        confined: Whether calls are kept from writing, from the network and from other processes; see
            :mod:`falign.rewards.confinement`.
    """

    def __init__(
        self,
        *,
        num_workers: int | None = None,
        memory_bytes: int | None = DEFAULT_MEMORY_BYTES,
        start_timeout: float = 120.0,
        confined: bool = False,
    ) -> None:
        self.num_workers = min(8, _num_cores()) if num_workers is None else num_workers
        if self.num_workers < 1:
            raise ValueError(f"num_workers={num_workers} must be at least 1.")
        self.memory_bytes = memory_bytes
        self.start_timeout = start_timeout
        self.confined = confined
        self._workers: list[_Worker] = []
        self._pid = os.getpid()
        self._lock = threading.Lock()
        weakref.finalize(self, _end, self._workers, self._pid)

    def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Return the outcomes in the order of the calls.

        Args:
            calls: Any number; as many run at once as there are processes.

        Raises:
            RewardError: A function cannot be imported, or arguments cannot be sent.
        """
        with self._lock:
            self._forget_after_fork()
            try:
                return _Round(self, calls).outcomes()
            finally:
                # Left in the midst of a round, by an error or an interrupt, a process would answer the next one.
                for worker in [worker for worker in self._workers if worker.index is not None]:
                    self.replace(worker)

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        with self._lock:
            self._forget_after_fork()
            _end(self._workers, self._pid)

    def idle_worker(self) -> _Worker | None:
        """Return a process that has nothing to do, started if need be; None where all are busy."""
        for worker in [worker for worker in self._workers if worker.index is None]:
            if worker.process.poll() is None:
                return worker
            self.replace(worker)  # it was killed between two rounds, by the system for instance
        if len(self._workers) < self.num_workers:
            self._workers.append(_Worker(self.memory_bytes, self.confined))
            return self._workers[-1]
        return None

    def replace(self, worker: _Worker) -> None:
        """End a process; the next call that finds no other idle one starts its successor."""
        self._workers.remove(worker)
        worker.end()

    def busy(self) -> list[_Worker]:
        """Return the processes that owe an answer."""
        return [worker for worker in self._workers if worker.index is not None]

    def _forget_after_fork(self) -> None:
        if self._pid != os.getpid():  # the processes are the parent's, and so are their answers
            for worker in self._workers:
                worker.connection.close()
            self._workers.clear()
            self._pid = os.getpid()


@cache
def shared_pool() -> ChildPool:
    """Return the pool that verifiers use unless they are given one; its processes are confined."""
    return ChildPool(confined=True)


@dataclass(eq=False)
class _Worker:
    """A process; ``index`` is the call that it works on, ``loading`` whether it is still at its import."""

    memory_bytes: int | None
    confined: bool
    process: subprocess.Popen[bytes] = field(init=False)
    connection: Any = field(init=False)  # of Pipe, whose class depends on the system
    loaded: set[str] = field(default_factory=set)
    index: int | None = None
    loading: bool = False
    deadline: float = 0.0

    def __post_init__(self) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                # Isolated: the folder of the file would shadow modules of the standard library.
                [sys.executable, "-I", str(WORKER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # so that what it starts is killed with it, and Ctrl-C reaches the parent alone
            )
        self.connection.send((list(sys.path), self.memory_bytes, self.confined))

    def send(self, index: int, request: bytes, timeout: float, *, loading: bool) -> None:
        self.index, self.loading = index, loading
        self.deadline = time.monotonic() + timeout
        self.connection.send_bytes(request)

    def end(self) -> None:
        self.connection.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class _Round:
    """One batch of calls on its way through a pool."""

    def __init__(self, pool: ChildPool, calls: Sequence[Call]) -> None:
        self.pool, self.calls = pool, calls
        self.waiting = deque(range(len(calls)))
        self.found: list[Outcome | None] = [None] * len(calls)

    def outcomes(self) -> list[Outcome]:
        while True:
            while self.waiting and (worker := self.pool.idle_worker()) is not None:
                self._begin(worker, self.waiting.popleft())
            busy = self.pool.busy()
            if not busy:
                return [outcome for outcome in self.found if outcome is not None]
            remaining = min(worker.deadline for worker in busy) - time.monotonic()
            answered = wait([worker.connection for worker in busy], timeout=max(0.0, remaining))
            for worker in busy:
                if worker.connection in answered:
                    self._receive(worker)
                elif worker.deadline <= time.monotonic():
                    self._expire(worker)

    def _begin(self, worker: _Worker, index: int) -> None:
        call = self.calls[index]
        loading = call.function not in worker.loaded
        timeout = self.pool.start_timeout if loading else call.timeout
        arguments = None if loading else dict(call.arguments)
        try:
            request = pickle.dumps((call.function, arguments, timeout))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise RewardError(
                f"{call.function}: an argument cannot be sent to another process ({error}). Pass plain values, or "
                "leave out the timeout, so that it is called in this process."
            ) from error
        # Where it has died, the want of an answer is what is read next.
        with contextlib.suppress(OSError):
            worker.send(index, request, timeout, loading=loading)

    def _receive(self, worker: _Worker) -> None:
        index = worker.index
        assert index is not None
        call = self.calls[index]
        try:
            answer = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError, ValueError):
            self.pool.replace(worker)
            died = f"its process died (exit status {worker.process.returncode})"
            if worker.loading:
                raise RewardError(f"{call.function} cannot be imported: {died}; more memory may help.") from None
            self.found[index] = Outcome("error", error="ProcessDied", message=died)
            return
        if worker.loading:
            if "error" in answer:
                raise RewardError(
                    f"{call.function} cannot be imported in a process of its own: {answer['error']}: "
                    f"{answer['message']}. Put it into an importable module; more memory may help."
                )
            worker.loaded.add(call.function)
            self._begin(worker, index)
            return
        worker.index = None
        self.found[index] = outcome = _outcome(answer)
        if outcome.error == "MemoryError":
            self.pool.replace(worker)  # what it still holds would make the next call fail

    def _expire(self, worker: _Worker) -> None:
        index = worker.index
        assert index is not None
        call = self.calls[index]
        self.pool.replace(worker)
        if worker.loading:
            raise RewardError(f"{call.function} was not imported within {self.pool.start_timeout:g} s.")
        self.found[index] = Outcome("timeout", message=f"killed after {call.timeout:g} s")


def _num_cores() -> int:
    # Those that this process may use, where the system says so.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _outcome(answer: Mapping[str, Any]) -> Outcome:
    if "value" in answer:
        return Outcome("value", answer["value"])
    kind = "timeout" if answer["error"] == "TimeoutError" else "error"
    return Outcome(kind, error=answer["error"], message=f"{answer['error']}: {answer['message']}")


def _end(workers: list[_Worker], pid: int) -> None:
    if pid == os.getpid():  # a forked copy of the pool ends nothing
        for worker in workers:
            worker.end()
        workers.clear()
