import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize(
    ("step", "entered", "left_out"),
    [
        ("offline", "objectives/pairwise.py", "objectives/policy_gradient.py"),
        ("online", "objectives/policy_gradient.py", "objectives/pairwise.py"),
    ],
)
def test_a_traced_step_enters_its_objective_and_nothing_before_or_after_the_step(step, entered, left_out, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", [])
    script = importlib.import_module("trace_steps")
    found = script.entered(step)
    files = {file for file, _ in found}
    everywhere = {"divergences/kullback_leibler.py", "scoring/vocabulary.py", "training/trainer.py", entered}
    assert everywhere <= files
    assert left_out not in files
    assert not [file for file in files if file.startswith(("cli/", "report/"))]
    assert "AlignmentTrainer.evaluate" not in {function for _, function in found}
    _, counts, _, name, *lines = script.report({step: found}, listed=True).splitlines()
    assert counts.split() == [step, str(len(files)), str(script.TARGETS[step]), str(len(found))]
    assert name == step
    assert [line.split()[1] for line in lines] == sorted(files)
    assert sum(int(line.split()[0]) for line in lines) == len(found)
