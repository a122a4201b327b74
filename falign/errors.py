"""Errors that falign raises at its borders, with place, value and remedy, and the masking of secrets in all output."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

__all__ = [
    "CheckError",
    "ConfigError",
    "DataError",
    "EngineError",
    "FalignError",
    "InstallationError",
    "JudgeError",
    "MemberError",
    "ModelError",
    "NonFiniteRewardError",
    "RewardError",
    "RolloutError",
    "StoppedError",
    "TrainingError",
    "holds_secret",
    "one_line",
    "refuse_passwords",
    "without_passwords",
    "without_secrets",
]

_SECRET = r"(?:password|passwd|secret|token|credentials?|api_?key|access_?key|private_?key|signature|sig)"
NAMES = re.compile(rf"(?:^|[_-]){_SECRET}$", re.IGNORECASE)

# pathlib collapses two slashes into one.
IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]+:/{1,2})[^\s/@\"'<>?#]+@", re.IGNORECASE)
IN_QUERY = re.compile(rf"([?&](?:[\w-]*[_-])?{_SECRET}=)[^\s&#\"'<>]+", re.IGNORECASE)
# Prefixes of tokens of Hugging Face, GitHub, GitLab, OpenAI and others.
TOKENS = re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[bap]-)[A-Za-z0-9_-]{16,}")

SHORTEST_SECRET = 8  # characters; a shorter one would occur in ordinary words


def one_line(error: BaseException) -> str:
    r"""Return the whole message of an exception on one line.

    Example:
        >>> one_line(ValueError("first\n  second"))
        'first second'
    """
    return " ".join(str(error).split())


class FalignError(Exception):
    """Base of all errors that a user can correct; the command line prints it and exits with its status.

    Passwords and tokens are masked in its message, whatever it quotes.

    Attributes:
        exit_status: Of the command line.
    """

    exit_status: int = 2

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_secrets(each) if isinstance(each, str) else each for each in args))


class ConfigError(FalignError, ValueError):
    """A run file, an option or a combination of options that cannot work."""


class CheckError(FalignError, AssertionError):
    """A divergence, objective, measure or reward that breaks its contract, as :mod:`falign.testing` found."""


class InstallationError(FalignError):
    """An installed library that is missing, too old or too new."""


class DataError(FalignError, ValueError):
    """A data file, or a row of one, that cannot be used."""


class MemberError(FalignError, ValueError):
    """A part of the user's own, such as a measure or a token weight, that raised an exception."""


class ModelError(FalignError):
    """A model, tokenizer or adapter that cannot be loaded, used or exported."""


class PublishingError(FalignError):
    """An upload that the Hub refuses, or a Hub that cannot be reached; the exported folder stays."""


class RewardError(FalignError):
    """A reward that cannot be called, or that returns an invalid value."""


class JudgeError(RewardError):
    """An LLM judge that cannot be asked, changes its version, or has spent its budget; its answers so far stay."""


class NonFiniteRewardError(RewardError):
    """A reward that is NaN or infinite."""


class RolloutError(FalignError):
    """Sampling that is impossible, or with results that are not from the policy."""


class EngineError(RolloutError):
    """An engine outside of this process that fails or misbehaves; the policy in this process is unchanged."""


class TrainingError(FalignError):
    """A run that cannot continue; what it has written stays."""


class StoppedError(FalignError):
    """A run that was stopped by a signal, and can be resumed.

    Args:
        message: Where it stopped, and how it goes on.
        signal: The number of the signal.
    """

    def __init__(self, message: str, *, signal: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal


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
