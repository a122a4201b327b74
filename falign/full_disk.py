"""Telling a full disk from other failures: most libraries report it as text, or as something else."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

__all__ = ["is_full_disk"]

FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE_BYTES = 1 << 20


def is_full_disk(error: BaseException, *, folder: Path | None = None) -> bool:
    """Return whether an error, or one that it came from, says that a disk or a quota is full.

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
    # Rust's libraries have the system's error as text: SafetensorError, and tokenizers' plain Exception.
    return any(f"os error {code})" in str(error) for code in FULL)


def _torch_cannot_write(error: BaseException, folder: Path) -> bool:
    # torch.save's writer reports the position in the file that it did not reach, and not why.
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
