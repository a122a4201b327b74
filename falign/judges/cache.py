"""Answers of judges on disk: none is paid for twice, and what they have cost is known to the next call."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from falign.durable import refuse_link
from falign.errors import ConfigError
from falign.judges.client import ChatReply

__all__ = ["AnswerCache", "request_key"]

_BUSY = 60.0  # seconds to wait for another process that writes
_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, url TEXT NOT NULL, model TEXT NOT NULL, content TEXT NOT NULL, finish_reason TEXT NOT NULL,
    answered_by TEXT NOT NULL, prompt_tokens INTEGER, completion_tokens INTEGER
) WITHOUT ROWID
"""


def request_key(url: str, body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an address and a request: model, messages and all options."""
    text = json.dumps([url, body], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """A file of answers (SQLite) that threads and processes share; it holds hashes of the messages, not their texts.

    Args:
        path: The file; made if it does not exist, with its folder.

    Raises:
        ConfigError: The file is a link, or something else.
    """

    def __init__(self, path: Path) -> None:
        refuse_link(path)
        self.path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_BUSY, check_same_thread=False, isolation_level=None)
            self._connection.execute(_TABLE)
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error

    def get(self, key: str) -> ChatReply | None:
        """Return an answer; None if it is not there."""
        columns = ", ".join(("content", "finish_reason", "answered_by", "prompt_tokens", "completion_tokens"))
        rows = self._run(f"SELECT {columns} FROM answers WHERE key = ?", (key,))
        return ChatReply(*rows[0]) if rows else None

    def put(self, key: str, url: str, model: str, reply: ChatReply) -> None:
        """Write an answer, which is on disk when this returns.

        Args:
            key: From :func:`request_key`.
            url: The address that was asked.
            model: The model that was asked for.
            reply: The answer.
        """
        self._run("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (key, url, model, *reply))

    def spent(self, url: str, model: str) -> tuple[int, int]:
        """Return the tokens of prompts and of answers that the file's answers of one model have cost."""
        totals = "COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0)"
        return self._run(f"SELECT {totals} FROM answers WHERE url = ? AND model = ?", (url, model))[0]

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _run(self, statement: str, values: tuple[Any, ...]) -> list[Any]:
        try:
            with self._lock:
                return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"cache={self.path} cannot be used ({error}): remove the file if it is damaged, or name another."
        )
