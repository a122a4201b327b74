import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
LIMITS = {"fails": 60.0, "hangs": 1.0, "works": 60.0}  # seconds


def gpu_check(out, *arguments):
    """Run the dry run of one equality; return exit status, table and what was written."""
    command = [str(SCRIPTS / "gpu_check.sh"), "--dry-run", "--out", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stdout, json.loads(out.read_text())


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("gpu_check")


def test_a_dry_run_checks_trees_against_padded_rows_and_marks_its_figures(tmp_path):
    status, table, found = gpu_check(tmp_path / "gpu.json", "--only", "equality/tree*")
    assert status == 0, table
    (measured,) = found["sections"]["equality"]["measurements"].values()
    assert (measured["status"], measured["dry_run"], found["dry_run"]) == ("passed", True, True)
    checks = measured["figures"]["checks"]
    assert {check["name"].split(":")[0] for check in checks} == {"float32", "bfloat16"}
    assert all(0 <= check["error"] <= check["allowed"] for check in checks)
    assert table.count("[dry run]") == len(checks) + 1
    assert "DRY RUN" in table


def test_a_broken_equality_is_reported_and_ends_with_status_1(tmp_path):
    status, table, found = gpu_check(tmp_path / "gpu.json", "--only", "equality/head*", "--perturb", "0.1")
    assert status == 1
    section = found["sections"]["equality"]
    assert section["status"] == "unequal"
    (measured,) = section["measurements"].values()
    broken = [check["name"] for check in measured["figures"]["checks"] if not check["passed"]]
    assert broken == ["float32: log-probabilities, nats", "bfloat16: log-probabilities, nats"]
    assert measured["error"] == "; ".join(broken)
    assert "unequal" in table


def test_what_fails_or_hangs_is_recorded_and_only_an_equality_gives_status_1(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SCRIPTS", tmp_path)
    (tmp_path / "fails.py").write_text("raise SystemExit('no such kernel')")
    (tmp_path / "hangs.py").write_text("import time; time.sleep(600)")
    (tmp_path / "works.py").write_text("print('noise'); print(12.5)")
    failed, hung, worked = (script.measure([f"{name}.py"], limit) for name, limit in LIMITS.items())
    assert failed["status"] == "failed"
    assert "no such kernel" in failed["error"]
    assert hung["status"] == "timed out"
    assert hung["seconds"] < 60
    assert worked["figures"] == {"mib": 12.5}
    assert script.measure(["works.py"], 0)["status"] == "no time left"
    for is_equality, status in ((True, 1), (False, 2)):
        assert script.exit_status({"sections": {"a": {"status": "timed out", "equality": is_equality}}}) == status


def test_sections_for_a_gpu_fit_into_nine_minutes_and_have_all_that_a_dry_run_has(script):
    real, dry = (script.sections(dry=is_dry, gpus=1, perturb=None) for is_dry in (False, True))
    assert sum(section.seconds for section in real) <= script.TOTAL_SECONDS < 9 * 60
    assert [section.name for section in real] == [section.name for section in dry]
    for section in real:
        scripts = {part for command in section.commands.values() for part in command if part.endswith(".py")}
        assert all((SCRIPTS / name).is_file() for name in scripts)
        assert all("cuda" in command for command in section.commands.values())
