"""The lock of a run folder, which keeps all but one process from writing to it."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from falign.errors import ConfigError

__all__ = ["LOCK", "RunLock"]

LOCK = "run.lock"


class RunLock:
    """A lock that is released when its process ends, even if it is killed.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._held = folder, FileLock(folder / LOCK)

    @property
    def is_held(self) -> bool:
        """True if this process holds the lock."""
        return self._held.is_locked

    def take(self) -> None:
        """Lock the folder, which must exist.

        Raises:
            ConfigError: Another process holds the lock.
        """
        try:
            self._held.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"{self.folder} belongs to a run that is in progress in another process ({LOCK} in it is locked): wait "
                "for it, stop it, or choose another output_dir."
            ) from error

    def require_free(self) -> None:
        """Refuse a folder that another process has locked.

        Raises:
            ConfigError: Another process holds the lock.
        """
        if (self.folder / LOCK).is_file() and not self.is_held:
            self.take()
            self.give_back()

    def give_back(self) -> None:
        """Release the lock."""
        if self.is_held:
            (self.folder / LOCK).unlink(missing_ok=True)
            self._held.release()
