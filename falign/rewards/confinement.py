"""The limits of a verifier's process: no writing, no network, no other processes, no access to this one.

It is loaded by :mod:`falign.rewards.worker` from its file, and imports no part of falign. Python's own functions are
refused by their events; on Linux the kernel refuses new processes, signals, sockets, named pipes and writing to files,
whatever calls it. What remains is the process itself: code of a completion that is evaluated in it can change how later
completions are judged by the same process.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Confinement"]

REFUSED = frozenset(
    {
        *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.removexattr", "os.rename", "os.rmdir"),
        *("os.setxattr", "os.symlink", "os.truncate", "os.utime", "os.chflags", "os.lockf"),
        *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system"),
        *("os.kill", "os.killpg", "signal.pthread_kill", "pty.spawn", "subprocess.Popen"),
        *("resource.setrlimit", "resource.prlimit", "sqlite3.enable_load_extension", "sqlite3.load_extension"),
        # They lead to the thread that holds the connection.
        *("sys._current_frames", "sys._current_exceptions", "sys.setprofile", "sys.settrace"),
        *("gc.get_objects", "gc.get_referents", "gc.get_referrers"),
    }
)
REFUSED_MODULES = ("ctypes.", "shutil.", "socket.", "tempfile.")
PROCESSES = Path("/proc")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Confinement:
    """An irrevocable ban of operations that a verifier does not need, lifted only during imports.

    An attempt raises PermissionError in the verifier. Printed text is dropped.
    """

    def __init__(self) -> None:
        importing = False

        def refuse(event: str, arguments: tuple[Any, ...]) -> None:
            if importing:
                return
            if event == "open":
                path, mode, flags = arguments
                refused = bool(flags & WRITING) or bool(set(mode or "") & set("wax+")) or _leads_out(path)
            else:
                refused = event in REFUSED or event.startswith(REFUSED_MODULES)
            if refused:
                raise PermissionError(f"{event}: a verifier's process may not write, connect or start another")

        @contextmanager
        def import_freely() -> Iterator[None]:
            nonlocal importing
            importing = True
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
                importing = False

        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.import_freely = import_freely
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        sys.dont_write_bytecode = True
        if sys.platform == "linux":
            _system_calls().refuse_system_calls()
        sys.addaudithook(refuse)
        with import_freely():  # afterwards nothing can be written
            pass


def _leads_out(path: Any) -> bool:
    """Return whether a file describes another process, whose environment may have secrets, or is a folder above one."""
    if not isinstance(path, str | bytes):
        return False  # an open descriptor
    file = os.path.realpath(os.fsdecode(path))
    parts = list(Path(file).parts)
    of_process = len(parts) > 2 and Path(file).is_relative_to(PROCESSES) and parts[2].isdigit()
    return (of_process and parts[2] != str(os.getpid())) or os.path.isdir(file)


def _system_calls() -> ModuleType:
    file = Path(__file__).with_name("system_calls.py")
    spec = importlib.util.spec_from_file_location("_falign_system_calls", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
