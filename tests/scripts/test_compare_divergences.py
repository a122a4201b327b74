"""The comparison as it is typed; what its commands compute is tested with them."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from falign import divergences
from falign.runfile import load_run_file
from tests.training.pairs import run_data, write_pairs

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "compare_divergences.py"
COMPARED = sorted((ROOT / "configs").glob("compare-*.yaml")) + sorted((ROOT / "configs").glob("fdpo-hh-*.yaml"))


def compare(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def run_file(tiny, tmp_path):
    data = run_data(tiny, write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "unused")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return file


def test_every_family_is_compared_at_one_strength_near_the_reference():
    script = runpy.run_path(str(SCRIPT))
    names = script["generators"](script["FAMILIES"])
    assert [divergences.get(name).second_derivative_at_one for name in names] == [1.0] * len(script["FAMILIES"])
    assert names[:3] == ["reverse_kl", "forward_kl", "standardized(jensen_shannon)"]
    assert script["generators"](names) == names
    assert script["generators"](["js", "alpha(0.5)"], own_scale=True) == ["jensen_shannon", "alpha(0.5)"]
    with pytest.raises(ValueError, match="total_variation has a kink at u = 1"):
        script["generators"](["total_variation"])


@pytest.mark.parametrize("file", COMPARED, ids=lambda file: file.stem)
def test_run_files_that_are_compared_at_one_beta_have_one_strength_near_the_reference(file):
    objective = load_run_file(file).objective.build()
    assert (objective.beta, objective.divergence.second_derivative_at_one) == (0.1, 1.0)


@pytest.mark.slow
def test_a_run_has_a_split_of_its_own_ends_in_a_table_and_a_page_and_is_not_done_twice(run_file, tmp_path):
    out = tmp_path / "compared"
    options = ["--divergences", "jensen_shannon", "--prompts", 2, "--completions", 2, "--max-new-tokens", 4]
    command = [run_file, "--out", out, *options, "training.max_steps=2"]  # fields may come after options
    first = compare(*command)
    assert first.returncode == 0, first.stderr[-2000:]
    assert first.stdout.count("$ falign train") == 1
    rows = [line.split("|") for line in first.stdout.splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows] == ["divergence", "---", "standardized(jensen_shannon)"]
    assert all(cell.strip() for row in rows for cell in row[1:-1])
    assert (out / "report" / "report.html").is_file()
    train, held_out = ({*(out / name).read_text().splitlines()} for name in ("train.jsonl", "held-out.jsonl"))
    assert train
    assert held_out
    assert not train & held_out

    again = compare(*command)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("$ falign") == 1  # the report
    assert again.stdout.splitlines()[-3:] == first.stdout.splitlines()[-3:]


def test_a_field_that_is_not_there_is_named_before_anything_is_written(run_file, tmp_path):
    done = compare(run_file, "--out", tmp_path / "compared", "data.max_lenght=5")
    assert done.returncode != 0
    assert "data.max_length" in done.stderr
    assert not (tmp_path / "compared").exists()
