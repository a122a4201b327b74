"""Recognition of a full disk: most libraries report it as text, or as another error."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

__all__ = ["is_full_disk"]

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
