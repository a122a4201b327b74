"""Outputs appear whole or not at all, leave nothing behind, and never lead out of their folder."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from falign import durable
from falign.durable import claimed, remove_leftovers, staged, write_whole
from falign.errors import ConfigError

PLACES = {
    "sync": (durable, "sync_file"),
    "write": (Path, "write_text"),
    "replace": (Path, "replace"),
    "rename": (Path, "rename"),
}


def killed(target, kind, place, after):
    """Write in a process that is killed instead of the call after so many."""
    child = os.fork()
    if child == 0:
        owner, name = PLACES[place]
        original, calls = getattr(owner, name), []

        def dies(*arguments, **options):
            calls.append(arguments)
            if len(calls) > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, name, dies)
        write(target, kind, "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def write(target, kind, text):
    with staged(target, kind) as temporary:
        (temporary / "file" if kind == "folder" else temporary).write_text(text)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "place", "after"),
    [
        ("file", "write", 0),
        ("file", "sync", 0),
        ("file", "replace", 0),
        ("folder", "write", 0),
        ("folder", "rename", 0),
        ("folder", "rename", 1),
    ],
)
def test_a_killed_write_leaves_what_was_there_and_the_next_one_cleans_up(tmp_path, kind, place, after):
    target = tmp_path / "target"
    content = target / "file" if kind == "folder" else target
    write(target, kind, "old")
    killed(target, kind, place, after)
    assert len(list(tmp_path.iterdir())) == 2 or after
    remove_leftovers(target)
    assert content.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    killed(target, kind, place, after)
    write(target, kind, "newer")
    assert content.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [target]


def test_what_another_process_is_writing_is_no_leftover(tmp_path):
    target = tmp_path / "target"
    with staged(target, "file") as slow:
        slow.write_text("slow")
        write_whole(target, "fast")
        assert target.read_text() == "fast"
        assert slow.exists()
    assert target.read_text() == "slow"


def test_leftovers_of_other_targets_stay(tmp_path):
    for name in (".other.0123abcd.partial", ".target.partial", "target.0123abcd.partial", ".target.0123abcg.partial"):
        (tmp_path / name).touch()
    before = sorted(tmp_path.iterdir())
    write_whole(tmp_path / "target", "x")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "target"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "report.html", "old")
    open_ = type(tmp_path).open
    monkeypatch.setattr(type(tmp_path), "open", lambda path, *mode: open_(type(tmp_path)("/dev/full"), *mode))
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(tmp_path / "report.html", "new")
    monkeypatch.undo()
    assert caught.value.filename == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_is_refused(tmp_path, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir() if kind == "folder" else elsewhere.write_text("mine")
    (tmp_path / "target").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="target is a link"), staged(tmp_path / "target", kind):
        pass
    assert elsewhere.is_dir() or elsewhere.read_text() == "mine"


def test_one_process_at_a_time(tmp_path):
    other = claimed(tmp_path / ".lock")
    with claimed(tmp_path / ".lock"), pytest.raises(ConfigError, match="is being written by another process"), other:
        pass
    with claimed(tmp_path / ".lock"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    file = tmp_path / "index.json"

    def write(number):
        for _ in range(50):
            write_whole(file, str(number) * 1000)

    with ThreadPoolExecutor(8) as threads:
        for writer in [threads.submit(write, number) for number in range(8)]:
            writer.result()
    assert len(set(file.read_text())) == 1
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
