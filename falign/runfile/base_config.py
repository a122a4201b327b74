"""The base of all sections of the run file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from falign.errors import ConfigError

if TYPE_CHECKING:
    from falign.divergences import Divergence

__all__ = ["FrozenModel", "named_divergence", "refusals"]


class FrozenModel(BaseModel):
    """A component of the run file: unknown keys and infinite numbers are errors, values never change."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


@contextmanager
def refusals(section: str = "objective") -> Iterator[None]:
    """Turn a ValueError of a library function into a ConfigError that names the section."""
    try:
        yield
    except ConfigError:
        raise  # it names its place already
    except ValueError as error:
        raise ConfigError(f"{section}: {error}") from error


def named_divergence(name: str, *, field: str = "objective.divergence") -> Divergence:
    """Return the divergence that a field names.

    Raises:
        ConfigError: With the field: the name is unknown, or its own divergence cannot be imported.
    """
    from falign import divergences

    return divergences.get(name, field=field)
