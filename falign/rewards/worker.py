"""The program of one verifier process: it calls the requested functions, and is killed if a call takes too long.

It is run as a file, not imported: ``import falign`` loads torch, which costs a second and memory in every process.
Requests come pickled from the run, which is trusted; replies go back as JSON, because the code here is not trusted.

The program forks. Its first process supervises: it outlives every call, and when the run or the second process ends, it
ends everything that the second process has started. The second process serves: one thread holds the connection and the
number that each reply must carry, the main thread calls the functions.
"""

from __future__ import annotations

import _thread
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import queue
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

VERIFIERS = "falign.rewards.verifiers"
ALIAS = "_falign_verifiers"
HEADER = struct.Struct("!I16s?")  # length of the content, number of the request, whether to replace the process
MOST_FRAMES = 12
LONGEST_MESSAGE = 10_000  # characters of an exception
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LOOK_EVERY = 0.25  # seconds between two checks that the run is still alive
GIVE_UP = 5.0  # seconds after which processes that cannot be killed are abandoned


def main() -> None:
    """Serve in a second process until the run closes its end or dies, and then end all started processes."""
    channel, run = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    supervisor = os.getpid()
    worker = os.fork()
    if worker:
        os.close(channel)
        _supervise(worker, run)
    os.setpgid(0, 0)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == supervisor:
        os.set_inheritable(channel, False)
        _serve(socket.socket(fileno=channel))


def _supervise(worker: int, run: int) -> None:
    """Wait for the end of a process or of the run, end all remaining processes, and exit with its status."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    status: int | None = None
    while status is None and not told and os.getppid() == run:
        status = _collect(worker)
        if status is None and select.select([reading], [], [], LOOK_EVERY)[0]:
            os.read(reading, 512)
    end = time.monotonic() + GIVE_UP
    while time.monotonic() < end:
        for process in _children():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker, signal.SIGKILL)
        try:
            found, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if found == worker:
            status = ended
        if not found:
            time.sleep(0.002)
    _exit_as(status)


def _collect(worker: int) -> int | None:
    """Collect processes that have ended, and return the status of one of them if it is among them."""
    while True:
        found, status = os.waitpid(-1, os.WNOHANG)
        if found in (0, worker):
            return status if found else None


def _children() -> list[int]:
    """Return the child processes of this one, orphans it adopted included, if the system reports them."""
    if sys.platform != "linux":
        return []
    found, own = [], os.getpid()
    for entry in os.listdir("/proc"):
        with suppress(OSError, ValueError, IndexError):
            process = int(entry)
            if int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]) == own:
                found.append(process)
    return found


def _exit_as(status: int | None) -> None:
    if status is not None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(0 if status is None else os.WEXITSTATUS(status))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _serve(channel: socket.socket) -> None:
    # A verifier's output must not be taken for a reply.
    os.dup2(2, 1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sys.path[:], memory_bytes, confined = pickle.loads(_receive(channel)[1])
    if memory_bytes is not None and sys.platform == "linux":  # other systems refuse it
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    _register_verifiers()
    requests: queue.SimpleQueue[tuple[bytes, queue.SimpleQueue[tuple[bytes, bool]]]] = queue.SimpleQueue()
    threading.Thread(target=_exchange, args=(channel, requests), daemon=True).start()
    del channel
    import_freely = _confinement().import_freely if confined else nullcontext
    functions: dict[str, Callable[..., Any]] = {}
    threads = _thread._count()
    while True:
        request, reply = requests.get()
        content, is_spent = _called(request, functions, import_freely)
        # A thread left by a call could interfere with the next call.
        reply.put((content, is_spent or (confined and _thread._count() > threads)))


def _exchange(channel: socket.socket, requests: Any) -> None:
    """Pass requests on and replies back. Only this function knows the numbers of requests.

    Args:
        channel: The connection.
        requests: Requests for the main thread, each with the queue for its reply.
    """
    try:
        while True:
            number, request = _receive(channel)
            reply: queue.SimpleQueue[tuple[bytes, bool]] = queue.SimpleQueue()
            requests.put((request, reply))
            content, is_spent = reply.get()
            channel.sendall(HEADER.pack(len(content), number, is_spent) + content)
    except (OSError, EOFError):  # the run has ended, or no longer needs this process
        os._exit(0)


def _receive(channel: socket.socket) -> tuple[bytes, bytes]:
    length, number, _ = HEADER.unpack(_exactly(channel, HEADER.size))
    return number, _exactly(channel, length)


def _exactly(channel: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = channel.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _called(
    request: bytes,
    functions: dict[str, Callable[..., Any]],
    import_freely: Callable[[], AbstractContextManager[None]],
) -> tuple[bytes, bool]:
    """Call the function of a request; return the reply, and whether the process must be replaced."""
    try:
        name, arguments = pickle.loads(request)
        if arguments is None:
            with import_freely():
                functions[name] = _load(name)
            value = None
        else:
            value = _finished(functions[name](**arguments))
        # Numbers of numpy and torch are not JSON, but can be converted.
        return json.dumps({"value": value}, default=float).encode(), False
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)[1:][-MOST_FRAMES:]
        lines = [(each.filename, each.lineno or 0, each.name, each.line or "") for each in frames]
        message = f"{error}"
        if len(message) > LONGEST_MESSAGE:  # it may quote a completion
            message = f"{message[:LONGEST_MESSAGE]} ... ({len(message)} characters)"
        told = {"error": type(error).__name__, "message": message, "lines": lines}
        return json.dumps(told).encode(), isinstance(error, MemoryError)  # it may still hold memory


def _finished(returned: Any) -> Any:
    """Return the result of an ``async`` function; all of them share one event loop."""
    if not inspect.isawaitable(returned):
        return returned

    async def wait() -> Any:
        return await returned

    return _event_loop().run_until_complete(wait())


@cache
def _event_loop() -> Any:
    import asyncio

    return asyncio.new_event_loop()


def _load(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if module.startswith(VERIFIERS):
        module = module.replace(VERIFIERS, ALIAS, 1)
    function: Any = importlib.import_module(module)
    for part in attribute.split("."):
        function = getattr(function, part)
    return function


def _confinement() -> Any:
    spec = importlib.util.spec_from_file_location("_falign_confinement", Path(__file__).with_name("confinement.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Confinement()


def _register_verifiers() -> None:
    folder = Path(__file__).parent / "verifiers"
    spec = importlib.util.spec_from_file_location(
        ALIAS, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[ALIAS] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


if __name__ == "__main__":
    main()
