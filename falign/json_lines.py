r"""Lines of JSON, each ended by ``\n`` alone.

``str.splitlines`` also splits at characters that stand unescaped inside JSON strings (U+0085, U+2028, U+2029), and at
control characters and ``\r``; text files with universal newlines also split at ``\r``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from falign.errors import ConfigError

__all__ = ["read_journal", "sealed", "split_lines", "unsealed"]


def split_lines(text: str) -> list[str]:
    r"""Return the lines of a text, without their ends.

    Example:
        >>> split_lines("one\u2028line\nanother\n")
        ['one\u2028line', 'another']
        >>> split_lines("")
        []
    """
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def read_journal(path: Path) -> Iterator[Any]:
    """Yield the values of a file of appended JSON lines; nothing if the file does not exist.

    Half a last line, which a killed process leaves and a running one is about to complete, is skipped.

    Args:
        path: UTF-8; bytes that are not are replaced.

    Raises:
        ConfigError: Another line is damaged.
    """
    if not path.is_file():
        return
    damage: ConfigError | None = None
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if damage is not None:
                raise damage
            try:
                yield json.loads(line)
            except (RecursionError, ValueError) as error:
                damage = ConfigError(f"{path}:{number} is damaged ({error}): remove the line.")
                damage.__cause__ = error


def sealed(value: Any) -> str:
    """Return a value as a line of JSON with its checksum, ended by a line feed."""
    return json.dumps({"value": value, "sha256": _checksum(value)}) + "\n"


def unsealed(line: str | bytes) -> Any:
    r"""Return the value of a line of :func:`sealed`.

    Raises:
        ValueError: The line has changed since.

    Example:
        >>> unsealed(sealed({"reward": 0.1}))
        {'reward': 0.1}
    """
    found = json.loads(line)
    if not isinstance(found, dict) or found.keys() != {"value", "sha256"}:
        raise ValueError("it has no checksum")
    if _checksum(found["value"]) != found["sha256"]:
        raise ValueError("its checksum differs")
    return found["value"]


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
