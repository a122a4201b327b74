import errno
import os
import re

import pytest
from safetensors import SafetensorError

from falign.errors import ModelError
from falign.models.staging import staged_folder


def write_and_fail(target, error, **options):
    with staged_folder(target, **options) as staging:
        (staging / "file").write_text("x")
        raise error


def test_the_folder_appears_only_at_the_end(tmp_path):
    target = tmp_path / "a" / "out"
    with staged_folder(target) as staging:
        (staging / "file").write_text("x")
        assert staging.parent == target.parent
        assert not target.exists()
    assert [entry.name for entry in target.parent.iterdir()] == ["out"]
    assert (target / "file").read_text() == "x"


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="half"):
        write_and_fail(tmp_path / "out", RuntimeError("half"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("I/O error: No space left (os error 28)"),
        Exception("No space left on device (os error 28)"),  # tokenizers
        Exception("Disk quota exceeded (os error 122)"),
    ],
)
def test_a_full_disk_is_reported_with_sizes_and_leaves_nothing(tmp_path, error):
    with pytest.raises(ModelError, match=r"out: the disk is full \([\d,]+ MiB free .* about 3 MiB needed\)"):
        write_and_fail(tmp_path / "out", error, needed_bytes=3 * 2**20)
    assert list(tmp_path.iterdir()) == []


TORCH_WRITER = "[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"


def test_a_full_disk_behind_torchs_writer_is_found_by_asking_the_disk(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(ModelError, match="out: the disk is full"):
        write_and_fail(tmp_path / "out", RuntimeError(TORCH_WRITER))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_as_the_cause_of_another_error_is_found(tmp_path):
    error = RuntimeError("cannot write")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ModelError, match="out: the disk is full"):
        write_and_fail(tmp_path / "out", error)


@pytest.mark.parametrize("error", [RuntimeError(TORCH_WRITER), Exception("broken (os error 5)"), KeyError("x")])
def test_other_errors_pass_unchanged_where_the_disk_has_room(tmp_path, error):
    with pytest.raises(type(error), match=re.escape(str(error))):
        write_and_fail(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_other_system_errors_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError):
        write_and_fail(tmp_path / "out", PermissionError(errno.EACCES, "denied"))


def test_an_occupied_folder_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ModelError, match="exists and is not empty: choose another folder"):
        write_and_fail(tmp_path / "out", AssertionError("the block ran"))
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_a_folder_is_replaced_whole_when_asked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with staged_folder(tmp_path / "out", existing="replace") as staging:
        (staging / "new").write_text("new")
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["new", "out"]


def test_a_replaced_folder_survives_an_error(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(RuntimeError):
        write_and_fail(tmp_path / "out", RuntimeError(), existing="replace")
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_the_faster_process_wins_with_keep(tmp_path):
    with staged_folder(tmp_path / "out", existing="keep") as staging:
        (staging / "file").write_text("slow")
        with staged_folder(tmp_path / "out", existing="keep") as other:
            (other / "file").write_text("fast")
    assert (tmp_path / "out" / "file").read_text() == "fast"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_files_get_the_mode_that_the_umask_gives(tmp_path):
    with staged_folder(tmp_path / "out") as staging:
        (staging / "private").touch(mode=0o600)
    plain = tmp_path / "plain"
    plain.touch()
    assert os.stat(tmp_path / "out" / "private").st_mode == os.stat(plain).st_mode
