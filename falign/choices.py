"""Names given by a user: the nearest known name, and short forms of values for messages."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, get_args

from falign.errors import ConfigError

__all__ = ["nearest", "require_choice", "shown", "similar"]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 2


def shown(value: Any) -> str:
    """Return a short ``repr`` of a value for a message."""
    return _SHORT.repr(value)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that ``name`` was probably meant to be, if there is one."""
    names = list(names)
    return similar(name, names) or next((other for other in names if name and other.startswith(name)), None)


def similar(name: str, names: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the most similar name, if there is one.

    Args:
        name: As the user wrote it.
        names: Known ones.
        cutoff: Least similarity, from 0 to 1, the share of letters in common.
    """
    return next(iter(get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def require_choice(option: str, value: str, choices: Any) -> None:
    """Raise ConfigError unless ``value`` is one of a ``Literal``'s (or a collection's) choices."""
    known = list(get_args(choices) or choices)
    if value not in known:
        guess = nearest(value, known)
        hint = f"; did you mean {guess!r}?" if guess else "."
        raise ConfigError(f"{option}={value!r} is unknown; choose one of {known}{hint}")
