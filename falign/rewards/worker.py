"""The program of one verifying process: it calls what it is told to, and is killed when that takes too long.

It is run as a file, not imported: ``import falign`` loads torch, which costs a second and memory in every process.
Requests come pickled from the parent, which is trusted; answers go back as JSON, because what runs here is not.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

VERIFIERS = "falign.rewards.verifiers"
ALIAS = "_falign_verifiers"
ORPHAN_FACTOR, ORPHAN_GRACE = 2.0, 2.0  # seconds beyond its deadline that a call outlives its parent


def main() -> None:
    """Serve until the parent closes its end or dies."""
    connection = Connection(int(sys.argv[1]))
    # What a verifier prints must not be mistaken for anything, and a crash of it leaves no core file.
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sys.path[:], memory_bytes, confined = connection.recv()
    if memory_bytes is not None and sys.platform == "linux":  # other systems refuse it
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    _register_verifiers()
    import_freely = _confinement().import_freely if confined else nullcontext
    functions: dict[str, Callable[..., Any]] = {}
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        connection.send_bytes(_answer(request, functions, import_freely))


def _answer(
    request: bytes,
    functions: dict[str, Callable[..., Any]],
    import_freely: Callable[[], AbstractContextManager[None]],
) -> bytes:
    try:
        name, arguments, timeout = pickle.loads(request)
        # The parent kills at the deadline. Should it be gone by then, the kernel does, whatever is running here.
        signal.setitimer(signal.ITIMER_REAL, timeout * ORPHAN_FACTOR + ORPHAN_GRACE)
        if arguments is None:
            with import_freely():
                functions[name] = _load(name)
            value = None
        else:
            value = functions[name](**arguments)
        # Numbers of numpy and torch are no JSON, but convert.
        return json.dumps({"value": value}, default=float).encode()
    except Exception as error:
        return json.dumps({"error": type(error).__name__, "message": f"{error}"[:1000]}).encode()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


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
