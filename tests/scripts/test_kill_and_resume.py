"""Real processes of the command line, killed by kill -9 and resumed: what is left equals what was never killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

ROOT = Path(__file__).parents[2]
SHORT = {"max_steps": 6, "save_steps": 2, "eval_steps": 3}
MOVING = {"kind": "moving_average", "alpha": 0.6, "every": 2}


def offline(tiny, folder, reference):
    return run_data(tiny, write_pairs(folder / "pairs.jsonl"), folder / "x", training=SHORT, reference=reference)


def online(tiny, folder, reference):
    prompts = write_prompts(folder / "prompts.jsonl")
    return online_data(tiny, prompts, folder / "x", training=SHORT, rollout={"updates": 2}, reference=reference) | {
        "objective": {"kind": "policy_gradient", "divergence": "reverse_kl", "beta": 0.05}
    }


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "reference"), [(offline, {"cache": "cache"}), (offline, MOVING), (online, MOVING)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_left_alone(kind, reference, tiny, tmp_path):
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(kind(tiny, tmp_path, reference)), encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts" / "kill_and_resume.py"), str(run_file), "--moments", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "3 kills" in done.stdout
    assert "0 of them differ from the one left alone" in done.stdout
