"""Versions of weights on a server: what is published, and how it gets there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import nn

__all__ = ["Published", "Sync"]


@dataclass(frozen=True)
class Published:
    """One version: its folder is kept as long as the server may want to read it.

    Attributes:
        version: The run's number.
        name: The server's name for it, never used twice.
        folder: Its weights, never written twice.
    """

    version: int
    name: str
    folder: Path


@runtime_checkable
class Sync(Protocol):
    """A way to bring weights to a server through folders that both see.

    Attributes:
        kind: Its name in the run file.
        exclusive: Whether a version takes the place of the one before.
    """

    kind: str
    exclusive: bool

    def write(self, model: nn.Module, folder: Path) -> None:
        """Write what a model has now to a folder, which appears complete or not at all."""
        ...

    def bring(self, versions: Collection[Published]) -> None:
        """Make sure that the server holds these versions and can sample them."""
        ...

    def doubt(self) -> None:
        """Take nothing for granted that the server was brought before: it may have been started anew."""
        ...

    def drop(self, version: Published) -> None:
        """Take a version from the server; running requests finish."""
        ...

    def model_of(self, version: Published) -> str:
        """Return what requests for a version name as their model."""
        ...

    def close(self) -> None:
        """Leave the server as it was found."""
        ...
