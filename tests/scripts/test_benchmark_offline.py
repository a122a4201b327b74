import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_offline.py"
BARE = (
    "import sys, runpy; sys.modules.update(dict.fromkeys({blocked}));"
    "sys.argv = ['benchmark_offline.py', *{arguments}];"
    "runpy.run_path({script!r}, run_name='__main__')"
)


def run(*arguments, blocked=()):
    given = ["--random-model", "tiny", "--steps", "2", "--batch", "2", "--threads", "1", *arguments]
    if blocked:
        code = BARE.format(blocked=[*blocked], arguments=given, script=str(SCRIPT))
        command = [sys.executable, "-c", code]
    else:
        command = [sys.executable, str(SCRIPT), *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def losses(line):
    return [float(value) for value in line.split()[5:]]


@pytest.mark.slow
def test_all_sides_do_the_same_work():
    sides = ("falign", "inside-trees")
    table = run("--sides", "trl", *sides).splitlines()
    trl, *own = (next(line for line in table if f" {side} " in line) for side in ("trl", *sides))
    for each in own:
        assert losses(each) == pytest.approx(losses(trl), abs=2e-4)
        assert len(losses(each)) == 2
    assert [line.split("'s step rate over TRL's")[0] for line in table[-2:]] == [*sides]


def test_a_bare_checkout_with_torch_transformers_and_peft_is_enough():
    blocked = ("trl", "bitsandbytes", "datasets", "jaxtyping", "pydantic", "typer", "rich", "evaluate", "matplotlib")
    out = run("--worker", "falign", "--objective", "tdpo", blocked=blocked)
    assert '"losses": [0.693' in out
