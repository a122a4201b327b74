import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_online.py"


def run(demo, *arguments):
    given = ["--random-model", "tiny", "--model", demo, "--steps", "2", "--new-tokens", "6", "--threads", "1"]
    command = [sys.executable, str(SCRIPT), *given, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--updates", "2", "--dtype", "bfloat16"), ("--loop", "bare")], ids=str)
def test_both_sides_sample_completions_of_one_length_and_time_the_parts_of_a_step(demo, options):
    table = run(demo, *options)
    for side in ("trl", "falign"):
        _, _, seconds, *parts, peak = next(line for line in table if f" {side} " in line).rsplit("  ", 1)[0].split()
        assert sum(map(float, parts)) == pytest.approx(float(seconds), rel=0.2, abs=0.02)
        assert float(peak) > 0
    assert [line.endswith("  6 to 6") for line in table[2:4]] == [True, True]
    assert [line.split(":")[0] for line in table[4:]] == [
        "whole step",
        "generation",
        "scoring",
        "update",
        "scoring and update",
        "falign's peak memory over TRL's",
    ]
