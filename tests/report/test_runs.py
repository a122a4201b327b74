import shutil

import pytest

from falign.errors import ConfigError
from falign.report import read_runs


def test_a_label_is_the_shortest_end_of_a_path_that_no_other_has(runs, tmp_path):
    offline = runs("offline")
    other = shutil.copytree(offline, tmp_path / "elsewhere" / "offline")
    assert [run.label for run in read_runs([offline])] == ["offline"]
    assert [run.label for run in read_runs([offline, other])] == ["runs/offline", "elsewhere/offline"]


def test_a_run_given_twice_is_refused(runs, monkeypatch):
    offline = runs("offline")
    monkeypatch.chdir(offline.parent)
    with pytest.raises(ConfigError, match="is given twice"):
        read_runs([offline, "offline"])


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        read_runs([tmp_path])
