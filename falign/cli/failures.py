"""Errors of processes that were started together: each writes to a file, and the launcher shows the first.

One that fails ends the others, whose errors about closed connections would hide the cause.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from falign.deadlines import end_with_parent

__all__ = ["FAILURES", "LAUNCHER", "end_quietly", "first_failure", "leave_failure"]

FAILURES = "FALIGN_FAILURES"
"""Names the folder of these files."""

LAUNCHER = "FALIGN_LAUNCHER"
"""The launcher's process."""


def leave_failure(text: str) -> bool:
    """Leave the report of an error to the launcher; return False without a launcher."""
    folder = os.environ.get(FAILURES)
    if folder is None or "RANK" not in os.environ:
        return False
    (Path(folder) / f"{time.time_ns():020}-{os.environ['RANK']}").write_text(text, encoding="utf-8")
    return True


def first_failure(folder: Path) -> str:
    """Return the report of the process that failed first; empty if there is no report."""
    files = sorted(folder.iterdir())
    return files[0].read_text(encoding="utf-8") if files else ""


def end_quietly() -> None:
    """Let a process that a launcher ends leave by an exit, which cleans up, and not by a report.

    One whose launcher is killed ends, too: it would go on training, and write, with nobody to stop it.
    """
    if "RANK" not in os.environ:
        return
    end_with_parent(int(os.environ.get(LAUNCHER, os.getppid())))

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, end)
