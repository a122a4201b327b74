"""The base of all sections of the run file, and the record of an object that a program gave for one."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr

from falign.code_identity import code_identity
from falign.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from falign.divergences import Divergence
    from falign.objectives import Objective

__all__ = ["FrozenModel", "ObjectiveSection", "PythonObject", "named_divergence", "refusals"]


class FrozenModel(BaseModel):
    """A component of the run file: unknown keys and infinite numbers are errors, values never change."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        # Each validator is built when it is first used: at once, those of sections are built again for every section
        # that holds them, before a run file is even read.
        defer_build=True,
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
    def of(cls, value: Any, *, hashed: Any = None, **fields: Any) -> Any:
        """Return the section of an object.

        Args:
            value: The object.
            hashed: What its ``code`` is the hash of, by default the object.
            fields: Further fields of the section.
        """
        named = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
        code = code_identity(value if hashed is None else hashed)
        section = cls(**{"name": named.__name__, **fields}, code=code)
        section._object = value
        return section

    @property
    def is_at_hand(self) -> bool:
        """True if the object is there, and not only its record."""
        return self._object is not None

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


class ObjectiveSection(FrozenModel):
    """An objective of the run file; it answers for what the run has to know of it before it is built."""

    kind: Any  # each section narrows it to its own name

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
        """The number of rewards that it reads one by one, before their weights; None if it reads their sum."""
        return None

    @property
    def weights_gradients(self) -> bool:
        """True if ``rollout.correction`` applies: a policy gradient, which importance weights correct."""
        return False

    @property
    def compares(self) -> tuple[Literal["group", "rollout"], str] | None:
        """Where it compares each completion with others, and the field that says so; None if it does not."""
        return None

    def unfitted(self) -> ObjectiveSection:
        """Return the section with placeholders for whatever is fitted on samples, for checks before there are any."""
        return self

    @abstractmethod
    def build(self) -> Objective:
        """Return the objective.

        Raises:
            ConfigError: A name is unknown, two fields contradict each other, or theory does not allow it; the message
                has the reason.
        """

    def build_on(self, features: Tensor) -> Objective:
        """Return the objective, fitted where :attr:`needs_samples`.

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
