"""``summary.json`` of an evaluation, with the checksums of the files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from falign.durable import checksum, write_whole
from falign.errors import ConfigError
from falign.passwords import without_passwords

__all__ = ["check_file", "write_summary"]


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``, whole or not at all.

    Args:
        folder: Of the evaluation.
        summary: Plain values; ``files`` has the SHA-256 of each file of rows that belongs to it.
    """
    text = without_passwords(json.dumps(summary, indent=1, ensure_ascii=False))
    write_whole(folder / "summary.json", text + "\n")


def check_file(folder: Path, name: str, summary: Mapping[str, Any]) -> Path | None:
    """Return a file of rows that belongs to a summary; None if the summary does not name it.

    Args:
        folder: Of the evaluation.
        name: Of the file.
        summary: What its ``summary.json`` holds.

    Raises:
        ConfigError: The file has other content than when the summary was written, or the summary has no checksums.
    """
    if not isinstance(summary.get("files"), dict):
        raise _damaged(folder / "summary.json", "it has no checksums")
    if name not in summary["files"]:
        return None
    file = folder / name
    if not file.is_file():
        raise _damaged(file, "it is missing")
    if checksum(file) != summary["files"][name]:
        raise _damaged(file, "its content has changed since its summary was written")
    return file


def _damaged(file: Path, reason: str) -> ConfigError:
    return ConfigError(f"{file} is damaged ({reason}): repeat its evaluation with --overwrite.")
