"""A command in several processes (``--launch``), whose first error is shown once."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from types import FrameType

from falign.deadlines import end_with_parent
from falign.errors import ConfigError

__all__ = ["FAILURES", "LAUNCHER", "Launch", "end_quietly", "first_failure", "launch", "leave_failure"]


NO_ZERO = (
    "falign is not tested with DeepSpeed, and no run under it has been shown to match a single process. --launch fsdp2 "
    "shards weights, gradients and optimizer state as ZeRO-3 does; if the model fits on each GPU, --launch ddp is "
    "faster."
)


class Launch(StrEnum):
    """The way several processes share a run."""

    ddp = "ddp"
    fsdp2 = "fsdp2"
    zero2 = "zero2"
    zero3 = "zero3"


FLAGS = {Launch.ddp: ["--multi_gpu"], Launch.fsdp2: ["--use_fsdp", "--fsdp_version", "2"]}


def launch(kind: Launch, processes: int | None, command: Sequence[str]) -> None:
    """Run a ``falign`` command in several processes on this machine.

    If processes fail, only the error of the first one is shown, and this process exits with its status.

    Args:
        kind: How the processes share the work.
        processes: Their number; None starts one per GPU.
        command: The arguments of ``falign``.

    Raises:
        ConfigError: The kind is not supported, or the number of processes is too small or larger than that of GPUs.
    """
    if kind not in FLAGS:
        raise ConfigError(f"--launch {kind.value} is not supported: {NO_ZERO}")
    import torch  # imported here, because it is slow and the help does not need it

    gpus = torch.cuda.device_count()
    count = processes or gpus
    if count < 2:
        raise ConfigError(
            f"--launch {kind.value} with {count} process{'' if count == 1 else 'es'}: give --processes, 2 or more, or "
            "leave --launch out."
        )
    if gpus and count > gpus:
        raise ConfigError(f"--processes {count} is more than the {gpus} GPUs here: each process needs one of its own.")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # On a failure the launcher would log its own traceback, which says nothing about the error.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    options = [*FLAGS[kind], "--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", threads]
    arguments = launch_command_parser().parse_args([*options, "--module", "falign", *command])
    with tempfile.TemporaryDirectory() as failures:
        os.environ[FAILURES], os.environ[LAUNCHER] = failures, str(os.getpid())
        try:
            launch_command(arguments)
        except ChildFailedError as error:
            print(first_failure(Path(failures)), end="", file=sys.stderr)
            _, failure = error.get_first_failure()
            sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
        except SignalException as error:
            print(first_failure(Path(failures)), end="", file=sys.stderr)  # where the run stopped
            sys.exit(128 + error.sigval)


FAILURES = "FALIGN_FAILURES"
"""Environment variable: the folder in which failed processes leave their reports."""

LAUNCHER = "FALIGN_LAUNCHER"
"""Environment variable: the process id of the launcher."""


def leave_failure(text: str) -> bool:
    """Leave the report of an error to the launcher; return False without a launcher."""
    folder = os.environ.get(FAILURES)
    if folder is None or "RANK" not in os.environ:
        return False
    # The name starts with the time, so that the first file in alphabetical order is the first failure.
    (Path(folder) / f"{time.time_ns():020}-{os.environ['RANK']}").write_text(text, encoding="utf-8")
    return True


def first_failure(folder: Path) -> str:
    """Return the report of the process that failed first; empty if there is no report."""
    files = sorted(folder.iterdir())
    return files[0].read_text(encoding="utf-8") if files else ""


def end_quietly() -> None:
    """Let a process of a launch exit with cleanup and without an error report when the launcher ends it.

    It also ends when its launcher is killed; otherwise it would keep training and writing with nobody to stop it.
    """
    if "RANK" not in os.environ:
        return
    end_with_parent(int(os.environ.get(LAUNCHER, os.getppid())))

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, end)
