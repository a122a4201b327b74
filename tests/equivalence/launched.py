"""Runs in one of several processes that a launcher started: the run files of a list, one after the other."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from rich.console import Console

from falign.training import parse_run, train
from falign.training.processes import is_writer, wait


def launched(case):
    """One run; ``resume`` ends it a second time, from its first checkpoint."""
    os.environ.pop("FALIGN_SHARDS", None)
    if case["kind"] == "fsdp2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    config = parse_run(case["run"])
    train(config, console=Console(quiet=True))
    if "resume" not in case:
        return
    wait()
    if is_writer():
        shutil.copytree(config.output_dir, case["resume"])
        for name in ("adapter", "checkpoint-10"):
            shutil.rmtree(Path(case["resume"]) / name)
    wait()
    train(config.model_copy(update={"output_dir": Path(case["resume"])}), console=Console(quiet=True), resume=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in json.loads(Path(sys.argv[1]).read_text()):
        launched(each)
