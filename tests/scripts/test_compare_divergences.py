"""The comparison as it is typed; what its commands compute is tested with them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.training.pairs import run_data, write_pairs

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_divergences.py"


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


@pytest.mark.slow
def test_a_run_has_a_split_of_its_own_ends_in_a_table_and_a_page_and_is_not_done_twice(run_file, tmp_path):
    out = tmp_path / "compared"
    options = ["--divergences", "alpha(0.5)", "--prompts", 2, "--completions", 2, "--max-new-tokens", 4]
    command = [run_file, "--out", out, *options, "training.max_steps=2"]  # fields may come after options
    first = compare(*command)
    assert first.returncode == 0, first.stderr[-2000:]
    assert first.stdout.count("$ falign train") == 1
    rows = [line.split("|") for line in first.stdout.splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows] == ["divergence", "---", "alpha(0.5)"]
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
