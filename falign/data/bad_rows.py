"""Rows that cannot be used: each stops the reading, or is left out and counted."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, get_args

from falign.errors import ConfigError, DataError

__all__ = ["BadRowPolicy", "BadRows", "nearest", "require_choice", "shown"]

BadRowPolicy = Literal["error", "skip"]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 2


def shown(value: Any) -> str:
    """Return a short ``repr`` of a value for a message."""
    return _SHORT.repr(value)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that ``name`` was probably meant to be, if there is one."""
    names = list(names)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return close[0] if close else next((other for other in names if other.startswith(name)), None)


def require_choice(option: str, value: str, choices: Any) -> None:
    """Raise ConfigError unless ``value`` is one of a ``Literal``'s (or a collection's) choices."""
    known = list(get_args(choices) or choices)
    if value not in known:
        guess = nearest(value, known)
        hint = f"; did you mean {guess!r}?" if guess else "."
        raise ConfigError(f"{option}={value!r} is unknown; choose one of {known}{hint}")


class BadRows:
    """Takes the error of each bad row: raises it, or counts it and keeps the first messages.

    Args:
        policy: ``"error"`` raises; ``"skip"`` counts and carries on.
        keep: How many messages are kept.
        skip_by: How the user asks for ``"skip"``, for messages; None where it is not possible.

    Attributes:
        count: Bad rows so far.
        messages: The messages of the first ``keep`` of them.
    """

    def __init__(self, policy: BadRowPolicy = "error", *, keep: int = 5, skip_by: str | None = None) -> None:
        require_choice("bad_rows", policy, BadRowPolicy)
        self._skip_by = skip_by
        self.policy = policy
        self.keep = keep
        self.count = 0
        self.messages: list[str] = []

    def add(self, error: DataError) -> None:
        """Raise or count one bad row.

        Raises:
            DataError: Under the policy ``"error"``.
        """
        if self.policy == "error":
            if self._skip_by is None:
                raise error
            raise DataError(f"{error} ({self._skip_by} leaves such rows out and counts them.)") from error
        self.count += 1
        if len(self.messages) < self.keep:
            self.messages.append(str(error))
