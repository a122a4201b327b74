"""Keeping passwords and tokens out of what is written: run files refuse them, and reports mask them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from falign.errors import ConfigError

__all__ = ["refuse_passwords", "without_passwords", "without_secrets"]

IN_URL = re.compile(r"(?<=://)[^\s/@\"'<>]+:[^\s/@\"'<>]+@")
NAMES = re.compile(
    r"(?:^|_)(?:password|passwd|secret|token|credentials?|api_?key|access_?key|private_?key)$", re.IGNORECASE
)
SHORTEST_SECRET = 8  # characters; a shorter one would be found in ordinary words


def without_passwords(text: str) -> str:
    """Return a text in which ``://user:password@`` of each URL has become ``://***@``."""
    return IN_URL.sub("***@", text)


def without_secrets(text: str) -> str:
    """Return a text without passwords in URLs, and without the values of environment variables with a secret's name."""
    secrets = {value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= SHORTEST_SECRET}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return without_passwords(text)


def refuse_passwords(values: Any, *, place: str) -> None:
    """Refuse a run file that holds a password or a token: it is copied into the run folder.

    Args:
        values: The run file as plain values.
        place: What messages call it.

    Raises:
        ConfigError: With the field, and never with its value.
    """
    for path, key, value in _texts(values):
        if NAMES.search(key) and value:
            raise ConfigError(
                f"{place}: {path} is a secret by its name, and run files are copied into run folders: leave it out, "
                "and set it in the environment (HF_TOKEN, WANDB_API_KEY ...)."
            )
        if IN_URL.search(value):
            raise ConfigError(
                f"{place}: {path} is a URL with a password, and run files are copied into run folders: leave it out, "
                "and use ~/.netrc or the environment."
            )


def _texts(values: Any, path: str = "", key: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _texts(value, f"{path}.{name}".strip("."), str(name))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _texts(value, f"{path}.{number}", key)
    elif isinstance(values, str):
        yield path, key, values
