"""The base of all sections of the run file, and the record of an object that a program gave for one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr

from falign.code_identity import code_identity
from falign.errors import ConfigError

if TYPE_CHECKING:
    from falign.divergences import Divergence

__all__ = ["FrozenModel", "PythonObject", "named_divergence", "refusals"]


class FrozenModel(BaseModel):
    """A component of the run file: unknown keys and infinite numbers are errors, values never change."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class PythonObject(FrozenModel):
    """The record of an object of a program, and the object itself where it is at hand.

    A run file holds only the record, so a section that is read from one has no object and cannot be built.
    """

    kind: Literal["python"] = "python"
    name: str
    """Of the function, or of the object's class."""
    code: str
    """SHA-256 of its source and its values."""
    _object: Any = PrivateAttr(default=None)

    @classmethod
    def of(cls, value: Any, **fields: Any) -> Any:
        """Return the section of an object."""
        named = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
        section = cls(**{"name": named.__name__, **fields}, code=code_identity(value))
        section._object = value
        return section

    def given(self, section: str) -> Any:
        """Return the object.

        Args:
            section: What messages call it.

        Raises:
            ConfigError: It is not at hand.
        """
        if self._object is None:
            raise ConfigError(
                f"{section} was an object in a program ({self.name}), which a run file cannot hold: call falign.train "
                "with the same object, and with resume=True to go on with the run."
            )
        return self._object


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
