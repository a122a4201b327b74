"""Divergences named in a run file, with errors of the mathematics translated into errors of the run file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from falign import divergences
from falign.errors import ConfigError
from falign.rewards.importing import import_attribute

__all__ = ["named_divergence", "refusals"]


@contextmanager
def refusals() -> Iterator[None]:
    """Turn a ValueError of the objectives into a ConfigError of the section."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"objective: {error}") from error


def named_divergence(name: str) -> divergences.Divergence:
    """Return a divergence by its registry name, or by ``module:attribute``.

    Raises:
        ConfigError: The attribute is not importable, or no divergence.
    """
    if ":" not in name:
        return divergences.get(name)
    value = import_attribute(name, given=f"objective.divergence={name!r}", wanted="attribute")
    if not isinstance(value, divergences.Divergence):
        raise ConfigError(f"objective.divergence={name!r} is a {type(value).__name__}, not a falign Divergence.")
    return value
