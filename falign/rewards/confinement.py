"""What a verifier's process may not do: write, reach the network, start or signal other processes.

It is loaded by :mod:`falign.rewards.worker` from its file, and imports nothing of falign. It holds what Python does on
behalf of a completion (an expression that is evaluated, a query that is run); a library's own machine code that calls
the kernel past Python can still reach it, but for files, to which the kernel lets nothing be written.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Confinement"]

REFUSED = frozenset(
    {
        *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.removexattr", "os.rename", "os.rmdir"),
        *("os.setxattr", "os.symlink", "os.truncate", "os.utime", "os.chflags", "os.lockf"),
        *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system"),
        *("os.kill", "os.killpg", "signal.pthread_kill", "pty.spawn", "subprocess.Popen"),
        *("resource.setrlimit", "resource.prlimit", "sqlite3.enable_load_extension", "sqlite3.load_extension"),
    }
)
REFUSED_MODULES = ("ctypes.", "shutil.", "socket.", "tempfile.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Confinement:
    """Refuses for good what a verifier has no need of, except while a module is imported.

    An attempt raises PermissionError in the verifier. What is printed goes nowhere.
    """

    def __init__(self) -> None:
        importing = False

        def refuse(event: str, arguments: tuple[Any, ...]) -> None:
            if importing:
                return
            if event == "open":
                _, mode, flags = arguments
                refused = bool(flags & WRITING) or bool(set(mode or "") & set("wax+"))
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
        sys.addaudithook(refuse)
        with import_freely():  # after which nothing can be written
            pass
