"""The base of all sections of the run file, and the record of an object in memory that replaces one."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_serializer
from typing_extensions import override

from falign.code_identity import code_identity
from falign.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from falign.divergences import Divergence
    from falign.objectives import Objective, Schedule

__all__ = [
    "FieldPath",
    "FrozenModel",
    "GivenSchedule",
    "ObjectiveSection",
    "PythonObject",
    "named_divergence",
    "refusals",
    "with_value",
]


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


FieldPath = tuple[str | int, ...]
"""Keys of mappings and numbers of items that lead to a value inside a section."""


class GivenSchedule(NamedTuple):
    """A schedule and its form in the run file.

    Attributes:
        form: As the run file has it.
        build: Returns the schedule, given the path of the field. A user's own controller is imported only then.
        plain: The value with which the section is validated, at a step.
        knots: The steps where its course changes.
        bounds: Further values that it may take.
    """

    form: Mapping[Any, Any]
    build: Callable[[str], Schedule]
    plain: Callable[[int], Any]
    knots: tuple[int, ...] = (0,)
    bounds: tuple[Any, ...] = ()

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, GivenSchedule) and self.form == other.form

    @override
    def __hash__(self) -> int:
        return hash(str(self.form))


def with_value(section: Any, path: FieldPath, value: Any) -> Any:
    """Return a section with another value inside of it, as a mapping of its keys.

    Args:
        section: A section, a mapping or a list.
        path: Where the value is.
        value: The value.
    """
    if not path:
        return value
    name, *rest = path
    if isinstance(section, list):
        return [with_value(item, (*rest,), value) if number == name else item for number, item in enumerate(section)]
    # Shallow: sections inside stay as they are, with the objects in memory that they may hold.
    keys = dict(section)
    return {**keys, name: with_value(keys[name], (*rest,), value)}


class ObjectiveSection(FrozenModel):
    """An objective of the run file, with the properties that a run needs before the objective is built."""

    kind: Any  # each section narrows it to its own name
    method: ClassVar[str] = ""
    """Name of the method in reports; ``""`` for the kind."""

    @property
    def learns_from_preferences(self) -> bool:
        """True for objectives of preference data, which an online run makes by ranking samples."""
        return False

    @property
    def is_surrogate(self) -> bool:
        """True if the gradient of the loss has a meaning, and its value has none."""
        return False

    _schedules: Mapping[FieldPath, GivenSchedule] = PrivateAttr(default_factory=dict)

    @model_serializer(mode="wrap")
    def _with_forms(self, handler: Any) -> Any:
        dumped = handler(self)
        for path, given in self._schedules.items():
            dumped = with_value(dumped, path, dict(given.form))
        return dumped

    def scheduled(self, schedules: Mapping[FieldPath, GivenSchedule]) -> ObjectiveSection:
        """Return the section with schedules in place of some of its values."""
        section = self.model_copy()
        section._schedules = schedules
        return section

    def objective(self, features: Tensor | None = None) -> Objective:
        """Return the objective, with the schedules of its coefficients.

        Args:
            features: As for :meth:`build_on`; None for placeholders of fitted values.

        Raises:
            ConfigError: As for :meth:`build`.
        """
        if not self._schedules:
            return self._plain(features)
        from falign.objectives import Scheduled

        paths = {".".join(map(str, path)): path for path in self._schedules}

        def remake(values: Mapping[str, Any]) -> Objective:
            section: Any = self
            for name, value in values.items():
                section = with_value(section, paths[name], value)
            try:
                made = type(self).model_validate(section)
            except ValidationError as error:
                raise ValueError("; ".join(each["msg"] for each in error.errors(include_url=False))) from error
            return made._plain(features)

        with refusals():
            schedules = {name: self._schedules[path].build(f"objective.{name}") for name, path in paths.items()}
            return Scheduled(self.scheduled({})._plain(features), schedules, remake)

    def _plain(self, features: Tensor | None) -> Objective:
        return self.unfitted().build() if features is None else self.build_on(features)

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
    def compares(self) -> tuple[Literal["group", "rollout"], str] | None:
        """The field by which it compares completions of one prompt, as messages quote it; None if it does not."""
        return None

    def penalties(self) -> Iterator[tuple[str, float]]:
        """Yield the field and β of each penalty on the reward; one with a schedule is left out."""
        yield from ()

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
