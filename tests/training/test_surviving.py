"""Runs that go on: after damage, a kill before the first checkpoint, and between two logs."""

import importlib
import io
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from falign.errors import ConfigError, FalignError, StoppedError, TrainingError
from falign.runfile import parse_run
from falign.training import train
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
                patch.setattr("falign.training.trainer.AlignmentTrainer.move_references", dying(dies_at))
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
    assert "resumes from checkpoint-2" in output.getvalue()
    assert_same(resumed, whole)
    names = {path.name for path in folder.iterdir()}
    assert {"damaged-checkpoint-4", "checkpoint-2", "checkpoint-4"} <= names


def test_where_no_checkpoint_is_whole_the_run_says_so_and_changes_nothing(start, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start("offline", "run", dies_at=2)
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").write_text("{")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainingError, match=r"no undamaged checkpoint \(checkpoint-2: trainer_state.json has 1 of"):
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


@KINDS
def test_a_run_that_was_killed_before_its_last_log_writes_it(start, kind, monkeypatch):
    whole = start(kind, "whole", logging_steps=3)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("falign.training.trainer.AlignmentTrainer._finalize_training", killed)
        with pytest.raises(KeyboardInterrupt):
            start(kind, "late", logging_steps=3)
    assert_same(start(kind, "late", logging_steps=3, resume=True), whole)
    assert sum("train_loss" in log for log in whole.folder.metrics()) == 1


@pytest.mark.parametrize(("kind", "number"), [("offline", signal.SIGINT), ("online", signal.SIGTERM)])
def test_a_signal_stops_a_run_at_the_end_of_its_step_with_a_checkpoint(start, kind, number, monkeypatch):
    """Also where the run file asks for no checkpoints."""
    changes = {"save_steps": None, "eval_steps": 3, "logging_steps": 2}
    whole = start(kind, "whole", **changes)

    def signalled(*args, step, **kwargs):
        if step == 2:
            os.kill(os.getpid(), number)

    handlers, output = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)], io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr("falign.training.trainer.AlignmentTrainer.move_references", signalled)
        with pytest.raises(
            StoppedError, match=r"stopped at step 3 of 5, with checkpoint-3 .*run\.yaml --resume"
        ) as told:
            start(kind, "stopped", console=Console(file=output, width=1000), **changes)
    assert told.value.exit_status == 128 + number
    assert f"{number.name}: the run stops after this step" in output.getvalue()
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert_same(start(kind, "stopped", resume=True, **changes), whole)


def test_a_second_signal_stops_a_run_at_once(start, monkeypatch):
    def signalled(*args, step, **kwargs):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("falign.training.trainer.AlignmentTrainer.move_references", signalled)
    with pytest.raises(KeyboardInterrupt):
        start("offline", "stopped")


REWARD = """
calls = 0

def judge(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == FAILS:
        raise LookupError("no such word")
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize("eval_steps", [None, 2])
def test_a_reward_that_fails_leaves_a_checkpoint_and_a_mended_one_goes_on(tiny, tmp_path, monkeypatch, eval_steps):
    monkeypatch.syspath_prepend(tmp_path)

    def run(name, fails, weight=1.0, **options):
        (tmp_path / "judges.py").write_text(REWARD.replace("FAILS", str(fails)))
        sys.modules.pop("judges", None)
        importlib.invalidate_caches()
        data = online_data(tiny, write_prompts(tmp_path / "prompts.jsonl"), tmp_path / name)
        data["rewards"] = [{"kind": "function", "function": "judges:judge", "weight": weight}]
        data["training"] = {**data["training"], "max_steps": 4, "eval_steps": eval_steps}
        return train(parse_run(data), console=Console(quiet=True), **options)

    whole = run("whole", 0)
    # The first call is of the evaluation before training; the fourth of the evaluation at step 2, if any, or of step 3.
    with pytest.raises(FalignError, match="no such word"):
        run("broken", 4)
    assert [path.name for path in (tmp_path / "broken").glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(ConfigError, match=r"reward judge differs from when the run began: .* `new_rewards`"):
        run("broken", 0, resume=True)
    with pytest.raises(ConfigError, match=r"rewards\.0\.weight .* accept the changed rewards with `new_rewards`, or"):
        run("broken", 0, weight=2.0, resume=True)
    resumed = run("broken", 0, resume=True, new_rewards=True)
    assert_same(resumed, whole)
    (change,) = resumed.folder.read_inputs()["changes"]
    assert change["after_step"] == 2
    assert change["rewards"].keys() == {"judge"}


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
    with another_process_in(tmp_path / "begun"), pytest.raises(ConfigError, match="in progress in another process"):
        start("offline", "begun")
    assert {path.name for path in (tmp_path / "begun").iterdir()} == {"run.lock"}
    assert start("offline", "begun").folder.path == tmp_path / "begun"  # the other one was killed
    assert not (tmp_path / "begun" / "run.lock").exists()

    with pytest.raises(KeyboardInterrupt):
        start("offline", "stopped", dies_at=3)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stopped").iterdir()}
    with another_process_in(tmp_path / "stopped"), pytest.raises(ConfigError, match="in progress in another process"):
        start("offline", "stopped", resume=True)
    with another_process_in(tmp_path / "stopped"), pytest.raises(ConfigError, match="in progress in another process"):
        start("offline", "stopped")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stopped").iterdir()}
    assert after.keys() == before.keys() | {"run.lock"}
    assert all(after[name] == before[name] for name in before)
    start("offline", "stopped", resume=True)
