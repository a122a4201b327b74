"""Runs in one of several processes that a launcher started: the run files of a list, one after the other."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from falign.errors import StoppedError
from falign.runfile import parse_run
from falign.training import train
from falign.training.processes import is_writer, shards, wait


def launched(case):
    """One run; ``resume`` ends it a second time, from its first checkpoint, and ``stop`` stops it in a step first."""
    os.environ.pop("FALIGN_SHARDS", None)
    if case["kind"] == "fsdp2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    config = parse_run(case["run"])
    if "stop" in case:
        stopped_in_one_process(config, case["stop"])
    train(config, console=Console(quiet=True), resume="stop" in case)
    if "resume" not in case:
        return
    wait()
    if is_writer():
        shutil.copytree(config.output_dir, case["resume"])
        for name in ("adapter", "checkpoint-10"):
            shutil.rmtree(Path(case["resume"]) / name)
    wait()
    train(config.model_copy(update={"output_dir": Path(case["resume"])}), console=Console(quiet=True), resume=True)


def stopped_in_one_process(config, at):
    """Begin a run in which one process alone gets a signal, twice, as from a launcher that passes it on."""

    def signalled(*args, step, **kwargs):
        if step == at and not is_writer():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("falign.training.trainer.AlignmentTrainer.move_references", signalled)
        with pytest.raises(StoppedError, match=f"stopped at step {at + 1} of .*, with checkpoint-{at + 1}") as told:
            train(config, console=Console(quiet=True))
    assert told.value.exit_status == 128 + signal.SIGTERM
    assert str(told.value).endswith(f"--resume --launch {'fsdp2' if shards() else 'ddp'} --processes 2`.")
    wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in json.loads(Path(sys.argv[1]).read_text()):
        launched(each)
