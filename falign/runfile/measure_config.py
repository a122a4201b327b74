"""Sections of measures: a name with its arguments as text, or a section with ``kind`` and settings."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from falign.objectives import Measure, get_measure
from falign.objectives.measures import MEASURES
from falign.registry import own_names_in
from falign.runfile.base_config import FrozenModel, PythonObject, named_divergence, refusals
from falign.runfile.members import OwnSection, section_of, union_of_kinds

__all__ = ["MeasureConfig", "OwnMeasureConfig", "PythonMeasureConfig", "build_measure", "is_known_measure"]


class MeasureSection(FrozenModel):
    """A quantity of next-token distributions."""

    kind: Any  # each section narrows it to its own name

    @property
    def is_known(self) -> bool:
        """True if :meth:`build` imports no code of the user's."""
        return not any(own_names_in(value) for value in self.model_dump().values() if isinstance(value, str))

    @abstractmethod
    def build(self, field: str) -> Measure:
        """Return the measure.

        Args:
            field: The path of the section, for messages.

        Raises:
            ConfigError: A setting is out of range, or a user's measure cannot be imported or is invalid.
        """


class _BuiltInMeasure(MeasureSection):
    """A built-in measure: the arguments of its class."""

    member: ClassVar[Callable[..., Measure]]

    @override
    def build(self, field: str) -> Measure:
        fields = {name: getattr(self, name) for name in type(self).model_fields.keys() - {"kind"}}
        made = {name: read(fields[name], field=f"{field}.{name}") for name, read in _named(type(self).member).items()}
        with refusals(field):
            return type(self).member(**(fields | made))


class OwnMeasureConfig(OwnSection, MeasureSection, extra="allow"):
    """A measure of your own: ``module:Name``, called with the other keys of the section."""

    @override
    def build(self, field: str) -> Measure:
        return self.make(MEASURES, place=field, protocol=Measure)


class PythonMeasureConfig(PythonObject, MeasureSection):
    """A measure that a program gave as an object."""

    @property
    @override
    def is_known(self) -> bool:
        return self.is_in_memory

    @override
    def build(self, field: str) -> Measure:
        return self.given(field)


_READERS: dict[Any, Callable[..., Any]] = {"Divergence": named_divergence, "Measure": get_measure}
"""Readers of names, by the annotations of the arguments that they stand for."""


def _named(member: Callable[..., Measure]) -> dict[str, Callable[..., Any]]:
    """Return the reader of each argument that a run file gives by its name, to be made when the measure is built."""
    parameters = inspect.signature(member).parameters
    return {name: _READERS[each.annotation] for name, each in parameters.items() if each.annotation in _READERS}


def _section(kind: str) -> type[_BuiltInMeasure]:
    member = MEASURES.get(kind)
    names: dict[str, Any] = {name: (str, ...) for name in _named(member)}
    section = section_of(member, kind=kind, base=_BuiltInMeasure, **names)
    section.member = staticmethod(member)
    return section


if TYPE_CHECKING:
    MeasureConfig = str | MeasureSection
else:
    MeasureConfig = union_of_kinds(
        {**{kind: _section(kind) for kind in MEASURES.names()}, "python": PythonMeasureConfig},
        own=OwnMeasureConfig,
        text=True,
    )
"""A measure: its name with arguments in parentheses, or a section with ``kind`` and settings."""


def build_measure(value: MeasureConfig, field: str) -> Measure:
    """Return the measure of a field.

    Args:
        value: A name or a section.
        field: Its path, for messages.

    Raises:
        ConfigError: A name or setting is wrong, or a user's measure cannot be imported or is invalid.
    """
    return get_measure(value, field=field) if isinstance(value, str) else value.build(field)


def is_known_measure(value: MeasureConfig) -> bool:
    """Return whether a measure can be built without an import of the user's code."""
    return not own_names_in(value) if isinstance(value, str) else value.is_known
