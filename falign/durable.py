"""Files and folders that appear complete or not at all, even after a kill, a full disk or a power cut.

What is being written lies beside its target as ``.NAME.XXXXXXXX.partial``, locked by the process that writes it. The
lock ends with the process, so the next write of the same target removes what a killed one has left.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from falign.errors import ConfigError

__all__ = [
    "append",
    "checksum",
    "claimed",
    "is_full_disk",
    "lock",
    "naming",
    "refuse_link",
    "remove_leftovers",
    "staged",
    "sync_file",
    "sync_folder",
    "sync_tree",
    "write_whole",
    "writing",
]


_LEFT = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<what>partial|replaced)")


def write_whole(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file completely or not at all, and return once it is on disk.

    Args:
        path: The file, replaced if it exists; its folder must exist.
        content: Text, bytes, or pieces of text.

    Raises:
        ConfigError: ``path`` is a link.
        OSError: It cannot be written; the error names ``path``.
    """
    pieces = [content] if isinstance(content, str | bytes) else content
    with writing(path) as temporary, temporary.open("wb") as file:
        for piece in pieces:
            file.write(piece.encode("utf-8", "surrogatepass") if isinstance(piece, str) else piece)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file for a library to write to, which takes the name ``path`` when the block ends.

    Raises:
        ConfigError: ``path`` is a link.
        OSError: It cannot be written; the error names ``path``.
    """
    with naming(path), staged(path, "file") as temporary:
        yield temporary


def append(path: Path, text: str, *, after: int | None = None) -> None:
    """Append to a log; a killed process leaves at most the beginning of the text.

    Args:
        path: The file, made if it does not exist.
        text: Whole lines.
        after: Bytes of the file that stay; what a killed process has left beyond them is cut off.

    Raises:
        OSError: It cannot be written; the error names ``path``.
    """
    with naming(path), path.open("ab") as file:
        if after is not None:
            file.truncate(after)
        file.write(text.encode("utf-8", "surrogatepass"))


@contextmanager
def staged(target: Path, kind: Literal["file", "folder"], *, keep: bool = False) -> Iterator[Path]:
    """Yield an empty temporary file or folder that takes the target's name when the block ends without an error.

    A folder takes the place of nothing, of an empty folder, or of another folder, which is removed.

    Args:
        target: The final path; its parent must exist.
        kind: Whether to make a file or a folder.
        keep: A folder that is not empty stays, and the new one is dropped.

    Raises:
        ConfigError: ``target`` is a link.
    """
    refuse_link(target)
    remove_leftovers(target)
    temporary = _sibling(target, "partial")
    with _locked(target.parent):
        temporary.touch(exist_ok=False) if kind == "file" else temporary.mkdir()
        descriptor = _lock(temporary)
    try:
        yield temporary
        if kind == "file":
            sync_file(temporary)
            temporary.replace(target)
        else:
            sync_tree(temporary)
            with _locked(target.parent):
                _publish(temporary, target, keep=keep)
        sync_folder(target.parent)
    finally:
        os.close(descriptor)
        _remove(temporary)


def remove_leftovers(target: Path) -> None:
    """Remove leftovers of killed processes beside a target, and restore it if one was killed while replacing it.

    Args:
        target: The final path of a file or folder; what living processes write of it stays.
    """
    if not target.parent.is_dir():
        return
    with _locked(target.parent):
        for entry in sorted(target.parent.iterdir()):
            match = _LEFT.fullmatch(entry.name)
            if match is None or match["name"] != target.name or entry.is_symlink() or not _abandoned(entry):
                continue
            if match["what"] == "replaced" and not target.exists():
                entry.rename(target)
            else:
                _remove(entry)


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep other processes out while the block runs.

    Args:
        path: A file that is locked meanwhile, and gone afterwards.

    Raises:
        ConfigError: Another process holds it, or it is a link.
    """
    refuse_link(path)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            lock(descriptor, path)
            # The previous holder may have removed the file between the two lines above.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                yield
                path.unlink()
                return
        finally:
            os.close(descriptor)


def lock(descriptor: int, path: Path) -> None:
    """Lock an open file until it is closed, also by the end of the process.

    Raises:
        ConfigError: Another process has locked it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"{path} is being written by another process: wait for it, or choose another place."
        ) from error


def refuse_link(path: Path) -> None:
    """Refuse to write through a link, because its target may belong to someone else.

    Raises:
        ConfigError: ``path`` is a link.
    """
    if path.is_symlink():
        raise ConfigError(f"{path} is a link: remove it, or choose another place.")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of the file to errors of writing it; the system's own message (a full disk) lacks it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # otherwise a library raised it, with its own text
            error.filename = str(path)
        raise


def checksum(path: Path, size: int | None = None) -> str:
    """Return the SHA-256 of a file, or of so many bytes at its beginning."""
    digest, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while block := file.read(min(left, 1 << 20)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Return once the content of a file is on disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Return once the names in a folder are on disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(folder: Path) -> None:
    """Return once a folder, with all files and folders below it, is on disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(Path(place, name))
        sync_folder(Path(place))


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, target: Path, *, keep: bool) -> None:
    if not (target.is_dir() and any(target.iterdir())):
        temporary.rename(target)  # atomic, also onto an empty folder
        return
    if keep:
        return
    # Two renames, because a non-empty folder cannot be renamed over: the name is free for an instant, never partial.
    replaced = _sibling(target, "replaced")
    target.rename(replaced)
    temporary.rename(target)
    shutil.rmtree(replaced)


def _sibling(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{what}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from making or removing temporaries in a folder meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    _flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _abandoned(path: Path) -> bool:
    """Return whether the process that made a temporary has ended without renaming or removing it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # a writer may finish at any time, and its temporary takes its final name
        return False
    try:
        return _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, how: int) -> bool:
    """Lock; return False if another process holds the lock, or if the file system has no locks."""
    try:
        fcntl.flock(descriptor, how)
    except OSError:  # without locks abandoned files cannot be recognized, so all leftovers stay
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE_BYTES = 1 << 20


def is_full_disk(error: BaseException, *, folder: Path | None = None) -> bool:
    """Return whether an error, or one of its causes, says that a disk or a quota is full.

    Args:
        error: What was raised.
        folder: Where it was being written, to ask the disk itself where the error names no cause.
    """
    return any(_says_so(each) or (folder is not None and _torch_cannot_write(each, folder)) for each in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _says_so(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    # Rust libraries give the system's error as text: SafetensorError, and a plain Exception of tokenizers.
    return any(f"os error {code})" in str(error) for code in FULL)


def _torch_cannot_write(error: BaseException, folder: Path) -> bool:
    # The writer of torch.save reports the position that it did not reach, but not the reason.
    if "inline_container" not in str(error):
        return False
    probe = folder / ".probe"
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
    except OSError as refusal:
        return refusal.errno in FULL
    finally:
        probe.unlink(missing_ok=True)
    return False
