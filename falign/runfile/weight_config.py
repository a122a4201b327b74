"""Sections of token weights: entries of the lists ``weights`` of objectives, distinguished by ``kind``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator
from typing_extensions import override

from falign.objectives.weights import WEIGHTS, TokenWeight
from falign.runfile.base_config import FrozenModel, PythonObject, refusals
from falign.runfile.members import OwnSection, section_of, union_of_kinds

__all__ = ["OwnWeightConfig", "TokenWeightConfig", "build_weights"]


class WeightSection(FrozenModel):
    """A token weight."""

    kind: Any  # each section narrows it to its own name

    @abstractmethod
    def build(self) -> TokenWeight:
        """Return the weight.

        Raises:
            ConfigError: A setting is out of range, or a custom weight cannot be imported.
        """


class _BuiltInWeight(WeightSection):
    """A built-in weight: the arguments of its class."""

    member: ClassVar[Callable[..., TokenWeight]]

    @override
    def build(self) -> TokenWeight:
        names = type(self).model_fields.keys() - {"kind"}
        with refusals():
            return type(self).member(**{name: getattr(self, name) for name in names})


class OwnWeightConfig(OwnSection, WeightSection, extra="allow"):
    """A token weight of your own: ``module:Name``, called with the other keys of the section."""

    @override
    def build(self) -> TokenWeight:
        with refusals():
            return self.make(WEIGHTS, place="objective.weights", protocol=TokenWeight)


class PythonWeightConfig(PythonObject, WeightSection):
    """The record of a token weight that was given as an object."""

    @override
    def build(self) -> TokenWeight:
        return self.given("objective.weights")


def _section(kind: str) -> type[_BuiltInWeight]:
    section = section_of(WEIGHTS.get(kind), kind=kind, base=_BuiltInWeight)
    section.member = staticmethod(WEIGHTS.get(kind))
    return section


def _named(value: Any) -> Any:
    """Read a bare name as the section with default settings."""
    return {"kind": value} if isinstance(value, str) else value


if TYPE_CHECKING:
    TokenWeightConfig = WeightSection
else:
    TokenWeightConfig = Annotated[
        union_of_kinds(
            {**{kind: _section(kind) for kind in WEIGHTS.names()}, "python": PythonWeightConfig}, own=OwnWeightConfig
        ),
        BeforeValidator(_named),
    ]
"""One weight of a list: its name, or a section with ``kind`` and settings."""


def build_weights(sections: Sequence[TokenWeightConfig]) -> tuple[TokenWeight, ...]:
    """Return the weights of a list.

    Raises:
        ConfigError: As :meth:`WeightSection.build`.
    """
    return tuple(section.build() for section in sections)
