"""A few hundred malformed inputs of every family; ``scripts/fuzz_inputs.py`` tries thousands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_inputs.py"


@pytest.mark.slow
def test_malformed_inputs_are_read_or_refused_and_leave_nothing_unfinished():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--inputs", "300", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    families, read, refused, failed = map(int, re.search(r"all +(\d+) +(\d+) +(\d+) +(\d+)", done.stdout).groups())
    assert families == read + refused
    assert failed == 0
    assert (refused > 100, read > 20) == (True, True)
    # What is never read, or never refused, was not spoilt in the way that was meant.
    for family, count, accepted in re.findall(r"^(\w+) +(\d+) +(\d+)", done.stdout, re.MULTILINE):
        assert int(count) < 10 or int(accepted) > 0 or family == "overrides"
