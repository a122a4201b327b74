"""Trackers get what metrics.jsonl gets."""

import json
import struct

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from falign.runfile import parse_run
from falign.training import train
from tests.training.pairs import run_data, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


def events(file):
    """The records of TensorBoard's file: length, checksum of it, event, checksum of that."""
    data, place = file.read_bytes(), 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        yield Event.FromString(data[place + 12 : place + 12 + length])
        place += 12 + length + 4


def test_tensorboard_has_all_values_in_the_run_folder_those_before_training_too(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_pairs(tmp_path / "pairs.jsonl")
    run = run_data(tiny, data, tmp_path / "run", training={"max_steps": 3, "report_to": "tensorboard"})
    summary = train(parse_run(run), console=Console(quiet=True))
    assert not (tmp_path / "runs").exists()  # where the tracker writes when it is told nothing
    files = list((tmp_path / "run" / "tensorboard").glob("events.*"))
    tracked = {
        (value.tag, event.step): value.simple_value
        for file in files
        for event in events(file)
        for value in event.summary.value
        if value.HasField("simple_value")
    }
    for log in map(json.loads, summary.folder.metrics_file.read_text().splitlines()):
        if "train_runtime" in log:
            continue
        for name, value in log.items() - {("step", log["step"])}:
            place = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
            assert tracked[place, log["step"]] == pytest.approx(value, rel=1e-6)
    assert ("eval/rewards/accuracies", 0) in tracked
