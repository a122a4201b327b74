"""Versions of weights on a server, and the interface of the ways to send them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import nn

__all__ = ["Published", "Sync"]


@dataclass(frozen=True)
class Published:
    """One version; its folder is kept as long as the server may read it.

    Attributes:
        version: The run's number for it.
        name: The server's name for it; never reused.
        folder: The folder of its weights; written once.
    """

    version: int
    name: str
    folder: Path


@runtime_checkable
class Sync(Protocol):
    """A way to send weights to a server through folders that both see.

    Attributes:
        kind: Its name in the run file.
        exclusive: Whether a version replaces the one before it.
    """

    kind: str
    exclusive: bool

    def write(self, model: nn.Module, folder: Path) -> None:
        """Write the current weights of a model to a folder, which appears only when it is complete."""
        ...

    def bring(self, versions: Collection[Published]) -> None:
        """Make sure that the server holds these versions and can sample them."""
        ...

    def check_held(self, version: Published) -> None:
        """Refuse the replies since the last `bring` if the server may have sampled them from other weights.

        Raises:
            ServerLostError: It was restarted, or got another version.
        """
        ...

    def doubt(self) -> None:
        """Forget which versions the server holds, because it may have been restarted."""
        ...

    def drop(self, version: Published) -> None:
        """Remove a version from the server; running requests finish."""
        ...

    def model_of(self, version: Published) -> str:
        """Return the model name in requests for a version."""
        ...

    def close(self) -> None:
        """Restore the server to its state before the first version."""
        ...
