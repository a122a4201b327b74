"""Passwords and tokens in output: run files refuse them, messages and reports mask them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["holds_secret", "refuse_passwords", "without_passwords", "without_secrets"]

_SECRET = r"(?:password|passwd|secret|token|credentials?|api_?key|access_?key|private_?key|signature|sig)"
NAMES = re.compile(rf"(?:^|[_-]){_SECRET}$", re.IGNORECASE)

# pathlib collapses two slashes into one.
IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]+:/{1,2})[^\s/@\"'<>?#]+@", re.IGNORECASE)
IN_QUERY = re.compile(rf"([?&](?:[\w-]*[_-])?{_SECRET}=)[^\s&#\"'<>]+", re.IGNORECASE)
# Prefixes of tokens of Hugging Face, GitHub, GitLab, OpenAI and others.
TOKENS = re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[bap]-)[A-Za-z0-9_-]{16,}")

SHORTEST_SECRET = 8  # characters; a shorter one would occur in ordinary words


def without_passwords(text: str) -> str:
    """Return a text in which the user of each URL, secrets of its query, and known kinds of tokens are ``***``."""
    return TOKENS.sub("***", IN_QUERY.sub(r"\1***", IN_URL.sub(r"\1***@", text)))


def without_secrets(text: str) -> str:
    """Return :func:`without_passwords`, also without the values of environment variables named like a secret."""
    secrets = {value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= SHORTEST_SECRET}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return without_passwords(text)


def holds_secret(text: str) -> bool:
    """Return whether a text contains something that :func:`without_passwords` masks."""
    return without_passwords(text) != text


def refuse_passwords(values: Any, *, place: str) -> None:
    """Refuse a run file that holds a password or a token: it is copied into the run folder.

    Args:
        values: The run file as plain values.
        place: What messages call it.

    Raises:
        ConfigError: With the field, and never with its value.
    """
    from falign.errors import ConfigError  # here, because falign.errors imports this module

    for path, key, value in _texts(values):
        if NAMES.search(key) and value:
            raise ConfigError(
                f"{place}: {path} is a secret by its name, and run files are copied into run folders: leave it out, "
                "and set it in the environment (HF_TOKEN, WANDB_API_KEY ...)."
            )
        if holds_secret(value):
            kind = "a URL with a password or a token" if "://" in value else "a token"
            raise ConfigError(
                f"{place}: {path} is {kind}, and run files are copied into run folders: leave it out, "
                "and use ~/.netrc or the environment."
            )


def _texts(values: Any, path: str = "", key: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _texts(value, f"{path}.{name}".strip("."), str(name))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _texts(value, f"{path}.{number}", key)
    elif isinstance(values, str) or (isinstance(values, int | float) and not isinstance(values, bool)):
        yield path, key, str(values)
