"""The base of all sections of the run file, and the record of an object in memory that replaces one."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr

from falign.code_identity import code_identity
from falign.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from falign.divergences import Divergence
    from falign.objectives import Objective

__all__ = ["FrozenModel", "ObjectiveSection", "PythonObject", "named_divergence", "refusals"]


class FrozenModel(BaseModel):
    """A component of the run file; it refuses unknown keys and infinite numbers, and its values never change."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        # Each validator is built at first use. Built at once, a section's validator would be built again for every
        # section that contains it, before any run file is read.
        defer_build=True,
    )


class PythonObject(FrozenModel):
    """The record of a Python object, with the object itself if it is in memory.

    A run file holds only the record, so a section that is read from one has no object and cannot be built.
    """

    kind: Literal["python"] = "python"
    name: str
    """Name of the function, or of the object's class."""
    code: str
    """SHA-256 of the source and the values."""
    _object: Any = PrivateAttr(default=None)

    @classmethod
    def of(cls, value: Any, *, hashed: Any = None, **fields: Any) -> Any:
        """Return the section of an object.

        Args:
            value: The object.
            hashed: The object whose hash is ``code``; by default ``value``.
            fields: Further fields of the section.
        """
        named = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
        code = code_identity(value if hashed is None else hashed)
        section = cls(**{"name": named.__name__, **fields}, code=code)
        section._object = value
        return section

    @property
    def is_in_memory(self) -> bool:
        """True if the object is in memory, and not only its record."""
        return self._object is not None

    def given(self, section: str) -> Any:
        """Return the object.

        Args:
            section: The section's name in messages.

        Raises:
            ConfigError: The object is not in memory.
        """
        if self._object is None:
            raise ConfigError(
                f"{section} was an object in a program ({self.name}), which a run file cannot hold: call falign.train "
                "with the same object, and with resume=True to resume the run."
            )
        return self._object


class ObjectiveSection(FrozenModel):
    """An objective of the run file, with the properties that a run needs before the objective is built."""

    kind: Any  # each section narrows it to its own name
    method: ClassVar[str] = ""
    """Name of the method in reports; ``""`` for the kind."""
    learns_from_preferences: ClassVar[bool] = False
    """True for objectives of preference data, which an online run makes by ranking samples."""
    is_surrogate: ClassVar[bool] = False
    """True if the gradient of the loss has a meaning, and its value has none."""

    @property
    def title(self) -> str:
        """The title of the run's plots."""
        return self.kind

    @property
    def needs_samples(self) -> bool:
        """True if :meth:`build` needs rewards of samples from the reference."""
        return False

    @property
    def num_rewards(self) -> int | None:
        """Number of rewards that it reads separately, before weights; None if it reads their weighted sum."""
        return None

    @property
    def weights_gradients(self) -> bool:
        """True if ``rollout.correction`` applies: for policy gradients, whose samples importance weights correct."""
        return False

    @property
    def compares(self) -> tuple[Literal["group", "rollout"], str] | None:
        """The field by which it compares completions of one prompt, as messages quote it; None if it does not."""
        return None

    def unfitted(self) -> ObjectiveSection:
        """Return the section with placeholders for fitted values, for checks before there are samples."""
        return self

    @abstractmethod
    def build(self) -> Objective:
        """Return the objective.

        Raises:
            ConfigError: A name is unknown, fields contradict each other, or the combination is impossible; the message
                has the reason.
        """

    def build_on(self, features: Tensor) -> Objective:
        """Return the objective, fitted to samples if :attr:`needs_samples`.

        Args:
            features: Rewards of M samples of the reference, shape (M, K).

        Raises:
            ConfigError: As for :meth:`build`; or the target's moments cannot be fitted.
        """
        return self.build()


@contextmanager
def refusals(section: str = "objective") -> Iterator[None]:
    """Turn a ValueError of a library function into a ConfigError that names the section."""
    try:
        yield
    except ConfigError:
        raise  # already has its place
    except ValueError as error:
        raise ConfigError(f"{section}: {error}") from error


def named_divergence(name: str, *, field: str = "objective.divergence") -> Divergence:
    """Return the divergence that a field names.

    Raises:
        ConfigError: The name is unknown, or the user's divergence cannot be imported; the message has the field.
    """
    from falign import divergences

    return divergences.get(name, field=field)
