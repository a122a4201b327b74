import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from falign.cli.launch import Launch, launch
from falign.errors import ConfigError
from tests.training.prompts import online_data, write_prompts

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", [Launch.zero2, Launch.zero3])
def test_zero_is_refused_with_the_reason_and_what_to_take(kind):
    with pytest.raises(ConfigError, match=f"{kind.value} is not supported: .* no run under it .* --launch fsdp2"):
        launch(kind, 2, [])


def test_one_process_is_no_launch():
    with pytest.raises(ConfigError, match="give --processes, 2 or more"):
        launch(Launch.ddp, 1, [])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on CPUs")
def test_an_error_in_one_process_ends_all_is_told_once_and_leaves_the_folder_free(tmp_path, tiny):
    prompts, run_file = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "run.yaml"
    run = online_data(tiny, prompts, tmp_path / "run", "one_too_few_in_the_second_process")
    run_file.write_text(yaml.safe_dump(run))
    command = [sys.executable, "-m", "falign", "train", str(run_file), "--launch", "ddp", "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert "one_too_few_in_the_second_process" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "run.yaml").exists()


def processes_about(path):
    """The processes whose command line names a path."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and entry.name != str(os.getpid()):
            try:
                command = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it has ended
                continue
            if str(path).encode() in command and state != "Z":
                found.append(int(entry.name))
    return found


def waited_for(condition, seconds):
    until = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < until:
        time.sleep(0.1)
    return met


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent-death signal is Linux's")
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on CPUs")
def test_a_launcher_that_is_killed_leaves_no_process_10_seconds_later(tmp_path, tiny):
    prompts, run_file = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "run.yaml"
    run = online_data(tiny, prompts, tmp_path / "run", "that_waits")
    run_file.write_text(yaml.safe_dump(run))
    command = [sys.executable, "-m", "falign", "train", str(run_file), "--launch", "ddp", "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FALIGN_TEST_WAITING": str(tmp_path / "waiting")}
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        assert waited_for((tmp_path / "waiting").exists, 300), (tmp_path / "log").read_text()
        assert len(processes_about(run_file)) == 3
        launcher.kill()
        launcher.wait()
        assert waited_for(lambda: not processes_about(run_file), 10)
    finally:
        for process in processes_about(run_file):
            os.kill(process, signal.SIGKILL)
