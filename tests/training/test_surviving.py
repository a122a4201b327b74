"""Runs that go on: after damage, a kill before the first checkpoint, and between two logs."""

import io
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from falign.errors import ConfigError, TrainingError
from falign.training import parse_run, train
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

TIMED = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
KINDS = pytest.mark.parametrize("kind", ["offline", "online"])


@pytest.fixture
def start(tiny, tmp_path):
    """Return a function that starts or resumes a run with few steps; ``dies_at`` ends it when a step begins."""

    def run(kind, name, *, resume=False, dies_at=None, console=None, **changes):
        if kind == "offline":
            data = run_data(tiny, write_pairs(tmp_path / "pairs.jsonl"), tmp_path / name)
        else:
            data = online_data(tiny, write_prompts(tmp_path / "prompts.jsonl"), tmp_path / name)
            data["rollout"] = {**data["rollout"], "updates": 2}
        data["training"] = {**data["training"], "max_steps": 5, "save_steps": 2, "save_total_limit": 5, **changes}
        data.pop("sampling", None)
        with pytest.MonkeyPatch.context() as patch:
            if dies_at is not None:
                patch.setattr("falign.training.trainer.move_when_due", dying(dies_at))
            return train(parse_run(data), console=console or Console(quiet=True), resume=resume)

    return run


def dying(at):
    def move(*args, step, **kwargs):
        if step == at:
            raise KeyboardInterrupt

    return move


def adapter(summary):
    return load_file(summary.folder.adapter / "adapter_model.safetensors")


def logs(summary):
    return [{name: value for name, value in log.items() if name not in TIMED} for log in summary.folder.metrics()]


def assert_same(left, right):
    assert logs(left) == logs(right)
    assert all(torch.equal(value, adapter(right)[name]) for name, value in adapter(left).items())
    assert left.after == right.after


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before_and_ends_as_if_nothing_had_been(start):
    whole = start("offline", "whole")
    with pytest.raises(KeyboardInterrupt):
        start("offline", "broken", dies_at=4)
    folder = whole.folder.path.with_name("broken")
    os.truncate(folder / "checkpoint-4" / "optimizer.pt", 1000)
    output = io.StringIO()
    resumed = start("offline", "broken", resume=True, console=Console(file=output))
    assert "checkpoint-4 is damaged (optimizer.pt has 1,000 of" in output.getvalue()
    assert "goes on from checkpoint-2" in output.getvalue()
    assert_same(resumed, whole)
    names = {path.name for path in folder.iterdir()}
    assert {"damaged-checkpoint-4", "checkpoint-2", "checkpoint-4"} <= names


def test_where_no_checkpoint_is_whole_the_run_says_so_and_changes_nothing(start, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start("offline", "run", dies_at=2)
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").write_text("{")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainingError, match=r"no whole checkpoint \(checkpoint-2: trainer_state.json has 1 of"):
        start("offline", "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@KINDS
def test_what_was_not_logged_yet_at_a_checkpoint_is_in_the_next_log(start, kind):
    whole = start(kind, "whole", logging_steps=3)
    with pytest.raises(KeyboardInterrupt):
        start(kind, "broken", dies_at=2, logging_steps=3)
    assert_same(start(kind, "broken", resume=True, logging_steps=3), whole)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(start, tmp_path):
    whole = start("offline", "whole")
    with pytest.raises(KeyboardInterrupt):
        start("offline", "broken", dies_at=1)
    (tmp_path / "broken" / "manifest.json").unlink()  # as of one that came no further than its run file
    output = io.StringIO()
    assert_same(start("offline", "broken", resume=True, console=Console(file=output)), whole)
    assert "has no checkpoint yet: the run begins again" in output.getvalue().replace("\n", " ")


@KINDS
def test_a_run_that_was_killed_after_its_last_step_writes_the_same_bytes(start, kind, monkeypatch):
    whole = start(kind, "whole", eval_steps=5)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("falign.training.run._write_model", killed)
        with pytest.raises(KeyboardInterrupt):
            start(kind, "late", eval_steps=5)
    late = start(kind, "late", eval_steps=5, resume=True)
    assert_same(late, whole)
    for name in ("before.json", "summary.json"):
        assert (late.folder.path / name).read_bytes() == (whole.folder.path / name).read_bytes()


def test_a_checkpoint_and_what_it_is_called_are_synced_before_it_counts(start, monkeypatch):
    events, sync, rename = [], os.fsync, os.rename

    def synced(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def renamed(source, target, **kwargs):
        events.append(("rename", str(target)))
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    folder = start("offline", "run", max_steps=2).folder.path
    at = events.index(("rename", str(folder / "checkpoint-2")))
    written = {path.name for path in (folder / "checkpoint-2").iterdir()}
    before = [place for kind, place in events[:at] if kind == "sync"]
    assert written <= {place.rpartition("/")[2] for place in before if "/.checkpoint-2." in place}
    assert str(folder / "metrics.jsonl") in before
    assert events[at + 1] == ("sync", str(folder))


@contextmanager
def another_process_in(folder):
    """A process that holds a run folder until it is killed."""
    folder.mkdir(exist_ok=True)
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True)"
    code += "; input()"
    command = [sys.executable, "-c", code, str(folder / "run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield
        process.kill()


def test_two_processes_do_not_write_to_one_run_folder(start, tmp_path):
    with another_process_in(tmp_path / "begun"), pytest.raises(ConfigError, match="going on in another process"):
        start("offline", "begun")
    assert {path.name for path in (tmp_path / "begun").iterdir()} == {"run.lock"}
    assert start("offline", "begun").folder.path == tmp_path / "begun"  # the other one was killed
    assert not (tmp_path / "begun" / "run.lock").exists()

    with pytest.raises(KeyboardInterrupt):
        start("offline", "stopped", dies_at=3)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stopped").iterdir()}
    with another_process_in(tmp_path / "stopped"), pytest.raises(ConfigError, match="going on in another process"):
        start("offline", "stopped", resume=True)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stopped").iterdir()}
    assert after.keys() == before.keys() | {"run.lock"}
    assert all(after[name] == before[name] for name in before)
    start("offline", "stopped", resume=True)
