"""The libraries whose configurations become run files."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from falign.foreign.rows import Value
from falign.foreign.translation import Translation
from falign.registry import Registry

__all__ = ["LIBRARIES", "Library"]


class Library(Protocol):
    """A function that translates the settings of one library."""

    def __call__(
        self, given: dict[str, Value], *, command: str | None, folder: Path, processes: int | None
    ) -> Translation:
        """Return the translation, without refusals.

        Args:
            given: The settings.
            command: The command that they belong to, if the settings do not name it themselves.
            folder: The folder that paths of settings may start from.
            processes: Number of processes of their run.

        Raises:
            ConfigError: Settings are unknown, invalid or have no counterpart; the message has them all.
        """
        ...


LIBRARIES: Registry[Library] = Registry(
    "library",
    {
        "trl": "falign.foreign.trl_commands:translated",
        "llamafactory": "falign.foreign.llamafactory:translated",
        "axolotl": "falign.foreign.axolotl:translated",
    },
    wanted="function that translates settings",
)
"""Libraries by name; each is a file with its rows and one with what the rows leave to it."""
