"""Calls in separate processes with a deadline each; killing one does not affect the run."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from falign.errors import RewardError
from falign.raised import CodeLine

__all__ = ["DEFAULT_MEMORY_BYTES", "Call", "ChildPool", "Outcome", "shared_pool"]

DEFAULT_MEMORY_BYTES = 4 << 30
WORKER = Path(__file__).with_name("worker.py")
NUMBER_BYTES = 16
HEADER = struct.Struct(f"!I{NUMBER_BYTES}s?")  # as in the worker
PART_BYTES = 1 << 16
LONGEST_REPLY = 1 << 26  # bytes
SECONDS_TO_END = 10.0
KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Call(NamedTuple):
    """One call.

    Attributes:
        function: ``module:function``, importable in a process with this one's ``sys.path``.
        arguments: By name; they must be picklable.
        timeout: Seconds until it is killed, imports excluded.
    """

    function: str
    arguments: Mapping[str, Any]
    timeout: float


class Outcome(NamedTuple):
    """The result of a call.

    Attributes:
        kind: ``value``: it returned; ``timeout``: it was killed at its deadline, or raised TimeoutError; ``error``: it
            raised, or its process died.
        value: The return value, as JSON represents it.
        error: The name of the exception's class; ``""`` if there is none.
        message: The message for the user.
        lines: Lines of the exception's traceback.
    """

    kind: Literal["value", "timeout", "error"]
    value: Any = None
    error: str = ""
    message: str = ""
    lines: tuple[CodeLine, ...] = ()


class ChildPool:
    """A few lasting processes, started when they are first needed.

    A process whose call passes its deadline is killed and replaced, so code that never looks at a signal (a regular
    expression, a symbolic simplification) is ended too. It may be used from any thread. The processes end with this
    one, however it ends, and with them all processes that calls have started.

    Args:
        num_workers: Number of concurrent calls; by default one per core, at most 8.
        memory_bytes: Address space of each process; None does not limit it.
        start_timeout: Seconds that importing a function may take.
        confined: Whether calls are kept from writing, from the network, from other processes and from the
            environment; see :mod:`falign.rewards.confinement`.
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
        weakref.finalize(self, _end, self._workers, self._pid)  # it must not hold the pool itself

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
                # After an error or an interrupt during a round, a process could send its reply in the next round.
                for worker in [worker for worker in self._workers if worker.index is not None]:
                    self.replace(worker)

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        with self._lock:
            self._forget_after_fork()
            _end(self._workers, self._pid)

    def idle_worker(self) -> _Worker | None:
        """Return an idle process, started if necessary; None if all are busy."""
        for worker in [worker for worker in self._workers if worker.index is None]:
            if worker.is_fit():
                return worker
            self.replace(worker)  # killed between two rounds, or a call left a thread that writes
        if len(self._workers) < self.num_workers:
            self._workers.append(_Worker(self.memory_bytes, self.confined))
            return self._workers[-1]
        return None

    def replace(self, worker: _Worker) -> None:
        """End a process; a later call that finds no idle one starts its successor."""
        self._workers.remove(worker)
        worker.end()

    def busy(self) -> list[_Worker]:
        """Return the processes with a pending reply."""
        return [worker for worker in self._workers if worker.index is not None]

    def _forget_after_fork(self) -> None:
        if self._pid != os.getpid():  # after a fork, the processes and their replies belong to the parent
            for worker in self._workers:
                worker.channel.close()
            self._workers.clear()
            self._pid = os.getpid()


@cache
def shared_pool() -> ChildPool:
    """Return the default pool of verifiers; its processes are confined."""
    return ChildPool(confined=True)


@dataclass(eq=False)
class _Worker:
    """A process; ``index`` is its current call, ``loading`` is True while that call's function is imported."""

    memory_bytes: int | None
    confined: bool
    process: subprocess.Popen[bytes] = field(init=False)
    channel: socket.socket = field(init=False)
    loaded: set[str] = field(default_factory=set)
    index: int | None = None
    loading: bool = False
    deadline: float = 0.0
    number: bytes = b""  # of the request, which the reply must repeat
    outgoing: bytearray = field(default_factory=bytearray)
    incoming: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        self.channel.setblocking(False)
        with theirs:
            self.process = subprocess.Popen(
                # Isolated, because the file's folder would shadow modules of the standard library.
                [sys.executable, "-I", str(WORKER), str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment() if self.confined else None,
                start_new_session=True,  # so that Ctrl-C reaches only the parent
            )
        self._queue(pickle.dumps((list(sys.path), self.memory_bytes, self.confined)))

    def ask(self, index: int, request: bytes, timeout: float, *, loading: bool) -> None:
        """Begin to send a request; :meth:`send` sends the rest of it."""
        self.index, self.loading = index, loading
        self.deadline = time.monotonic() + timeout
        self.number = os.urandom(NUMBER_BYTES)
        self._queue(request)
        self.send()

    def send(self) -> None:
        """Send as much as the connection accepts now."""
        # If the process has died, the next read finds the missing reply.
        with contextlib.suppress(BlockingIOError, OSError):
            while self.outgoing:
                del self.outgoing[: self.channel.send(self.outgoing)]

    def receive(self) -> _Reply | None:
        """Return the reply, or None if it is still incomplete.

        Raises:
            EOFError: The process has ended.
            ValueError: It wrote something other than its reply.
        """
        try:
            part = self.channel.recv(PART_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise EOFError from error
        if not part:
            raise EOFError
        self.incoming += part
        if len(self.incoming) < HEADER.size:
            return None
        length, number, is_spent = HEADER.unpack_from(self.incoming)
        # Code of a completion may write to the connection; only the program knows the number of the request.
        if number != self.number or length > LONGEST_REPLY or len(self.incoming) > HEADER.size + length:
            raise ValueError
        if len(self.incoming) < HEADER.size + length:
            return None
        content, self.incoming = bytes(self.incoming[HEADER.size :]), bytearray()
        return _Reply(json.loads(content), is_spent)

    def is_fit(self) -> bool:
        """Return whether the process is alive and has written nothing without a request."""
        try:
            self.channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def end(self) -> None:
        """End the process and everything that it has started."""
        self.channel.close()
        # Its supervisor also ends processes in other sessions, and then itself.
        self.process.terminate()
        try:
            self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the system then kills the supervised process
            self.process.wait()

    def _queue(self, content: bytes) -> None:
        self.outgoing += HEADER.pack(len(content), self.number or bytes(NUMBER_BYTES), False) + content


class _Reply(NamedTuple):
    """A reply, and whether its process must be replaced."""

    content: Any
    is_spent: bool


class _Round:
    """One batch of calls in a pool."""

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
            # Sleep until a process can be read or written, at most until the first deadline.
            remaining = min(worker.deadline for worker in busy) - time.monotonic()
            with selectors.DefaultSelector() as selector:
                for worker in busy:
                    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outgoing else 0)
                    selector.register(worker.channel, events, worker)
                ready = {key.data.process.pid: mask for key, mask in selector.select(max(0.0, remaining))}
            for worker in busy:
                mask = ready.get(worker.process.pid, 0)
                if mask & selectors.EVENT_WRITE:
                    worker.send()
                if mask & selectors.EVENT_READ:
                    self._receive(worker)
                # It may have sent something, but no complete reply.
                if worker.index is not None and worker.deadline <= time.monotonic():
                    self._expire(worker)

    def _begin(self, worker: _Worker, index: int) -> None:
        call = self.calls[index]
        # A function is imported by a request of its own, so that imports do not count against the call's deadline.
        loading = call.function not in worker.loaded
        timeout = self.pool.start_timeout if loading else call.timeout
        arguments = None if loading else dict(call.arguments)
        try:
            request = pickle.dumps((call.function, arguments))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise RewardError(
                f"{call.function}: an argument cannot be sent to another process ({error}). Pass plain values, or "
                "leave out the timeout, so that it is called in this process."
            ) from error
        worker.ask(index, request, timeout, loading=loading)

    def _receive(self, worker: _Worker) -> None:
        index = worker.index
        assert index is not None
        call = self.calls[index]
        try:
            reply = worker.receive()
        except (EOFError, ValueError) as error:
            self.pool.replace(worker)
            status = f"its process died (exit status {worker.process.returncode})"
            died = status if isinstance(error, EOFError) else "its process wrote something other than one reply"
            if worker.loading:
                raise RewardError(f"{call.function} cannot be imported: {died}; more memory may help.") from None
            self.found[index] = Outcome("error", error="ProcessDied", message=died)
            return
        if reply is None:
            return
        content = reply.content
        if worker.loading:
            if "error" in content:
                raise RewardError(
                    f"{call.function} cannot be imported in a separate process: {content['error']}: "
                    f"{content['message']}. Put it into an importable module; more memory may help."
                )
            worker.loaded.add(call.function)
            self._begin(worker, index)
            return
        worker.index = None
        self.found[index] = _outcome(content)
        if reply.is_spent:
            self.pool.replace(worker)

    def _expire(self, worker: _Worker) -> None:
        index = worker.index
        assert index is not None
        call = self.calls[index]
        self.pool.replace(worker)
        if worker.loading:
            raise RewardError(f"{call.function} was not imported within {self.pool.start_timeout:g} s.")
        self.found[index] = Outcome("timeout", message=f"killed after {call.timeout:g} s")


def _environment() -> dict[str, str]:
    """Return the environment variables that Python needs: paths of libraries and numbers of threads."""
    return {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}


def _num_cores() -> int:
    # The cores that this process may use, if the system reports them.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _outcome(reply: Mapping[str, Any]) -> Outcome:
    if "value" in reply:
        return Outcome("value", reply["value"])
    kind = "timeout" if reply["error"] == "TimeoutError" else "error"
    lines = tuple(CodeLine(*line) for line in reply["lines"])
    return Outcome(kind, error=reply["error"], message=f"{reply['error']}: {reply['message']}", lines=lines)


def _end(workers: list[_Worker], pid: int) -> None:
    if pid == os.getpid():  # a forked copy of the pool ends nothing
        for worker in workers:
            worker.end()
        workers.clear()
