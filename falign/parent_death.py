"""Ending with the process that started this one, however that one ends: a kill leaves nothing behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["end_with_parent"]

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when its parent is gone; on Linux alone, for others have no such signal.

    Args:
        parent: The process that started this one. Where it is gone already, this one ends at once.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the system was told
        os.kill(os.getpid(), signal.SIGKILL)
