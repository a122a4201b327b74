"""Cached folders, such as converted models and averages, verified by checksum when they are used again."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from falign.durable import checksum
from falign.errors import ModelError
from falign.models.staging import reading, staged_folder

__all__ = ["kept_folder"]

_SEAL = "kept.json"


def kept_folder(folder: Path, write: Callable[[Path], None], *, needed_bytes: int | None = None) -> Path:
    """Return a folder of the cache; the first call writes it.

    ``kept.json`` holds a checksum of each file. Later calls compare them, once per process unless the size or time of a
    file changes.

    Args:
        folder: The folder; its name identifies everything that its content depends on.
        write: Writes the content into a given empty folder.
        needed_bytes: The expected size, for the message when the disk is full.

    Raises:
        ModelError: The folder was found with other content than was written, or the disk is full.
    """
    if not (folder / _SEAL).is_file():
        with staged_folder(folder, existing="keep", needed_bytes=needed_bytes) as staging:
            write(staging)
            sums = {file.name: checksum(file) for file in sorted(staging.iterdir())}
            (staging / _SEAL).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    files = sorted(folder.iterdir())
    _check(folder, tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    return folder


@cache
def _check(folder: Path, files: tuple[tuple[str, int, int], ...]) -> None:
    """Compare a folder with its checksums; a change of ``files`` (names, sizes, times) misses the cache of results."""
    with reading(partial(_unreadable, folder)):
        sums = dict(json.loads((folder / _SEAL).read_text(encoding="utf-8")))
    found = {name for name, _, _ in files} - {_SEAL}
    for name in sorted(found | sums.keys()):
        if name not in found or checksum(folder / name) != sums.get(name):
            raise ModelError(f"{folder / name} is missing or damaged: delete {folder}, and it is made again.")


def _unreadable(folder: Path, error: Exception) -> ModelError:
    return ModelError(f"{folder / _SEAL} cannot be read ({error}): delete {folder}, and it is made again.")
