"""The field ``advantage`` of the run file: a name, or a list of names and sections distinguished by ``kind``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import BeforeValidator, create_model
from typing_extensions import override

from falign.objectives import AdvantageEntry, AdvantageTransform, get_advantage, get_transform
from falign.objectives.advantage_list import TRANSFORMS
from falign.objectives.advantages import ADVANTAGES
from falign.registry import is_own_name
from falign.runfile.base_config import FrozenModel, refusals
from falign.runfile.members import OwnSection, call_with_settings, section_of, text_or, union_of_kinds

__all__ = ["AdvantageConfig", "OwnAdvantageConfig", "built_advantage", "compared_by"]

PLACE = "objective.advantage"


class AdvantageSection(FrozenModel):
    """An entry of a list of advantages."""

    kind: Any  # each section narrows it to its own name

    @abstractmethod
    def build(self) -> AdvantageEntry:
        """Return the entry.

        Raises:
            ConfigError: A setting is out of range, or a custom entry cannot be imported.
        """


class _NamedAdvantage(AdvantageSection):
    """An advantage of rewards, which has no settings."""

    @override
    def build(self) -> AdvantageEntry:
        return self.kind


class _TransformSection(AdvantageSection):
    """A built-in transform: the arguments of its function."""

    member: ClassVar[Callable[..., AdvantageTransform]]

    @override
    def build(self) -> AdvantageEntry:
        names = type(self).model_fields.keys() - {"kind"}
        with refusals():
            return type(self).member(**{name: getattr(self, name) for name in names})


class OwnAdvantageConfig(OwnSection, AdvantageSection, extra="allow"):
    """An entry of your own: ``module:Name``, called with the other keys of the section if there are any."""

    @override
    def build(self) -> AdvantageEntry:
        member: Any = ADVANTAGES.get(self.kind, field=PLACE)
        if not self.model_extra and not isinstance(member, type):
            return member
        with refusals():
            made: Any = call_with_settings(member, self.model_extra or {}, name=self.kind, place=PLACE)
            return cast("AdvantageEntry", made)


def _named(kind: str) -> type[_NamedAdvantage]:
    name = "".join(part.capitalize() for part in kind.split("_")) + "Config"
    kinds: Any = Literal[kind]  # pyright: ignore[reportInvalidTypeForm]
    return create_model(name, __base__=_NamedAdvantage, __module__=__name__, kind=(kinds, kind))


def _transform(kind: str) -> type[_TransformSection]:
    section = section_of(TRANSFORMS.get(kind), kind=kind, base=_TransformSection)
    section.member = staticmethod(TRANSFORMS.get(kind))
    return section


if TYPE_CHECKING:
    AdvantageConfig = str | tuple[AdvantageSection, ...]
else:
    _ENTRY = union_of_kinds(
        {
            **{kind: _named(kind) for kind in (*ADVANTAGES.names(), "gae")},
            **{kind: _transform(kind) for kind in TRANSFORMS.names()},
        },
        own=OwnAdvantageConfig,
    )
    _BARE = BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value)
    AdvantageConfig = text_or(tuple[Annotated[_ENTRY, _BARE], ...])
"""An advantage of rewards by its name, or a list that begins with one and goes on with transforms."""


def built_advantage(chosen: AdvantageConfig) -> str | AdvantageEntry | tuple[AdvantageEntry, ...]:
    """Return what an objective takes as its advantage.

    Raises:
        ConfigError: A name is unknown, or an entry cannot be built.
    """
    if not isinstance(chosen, str):
        return tuple(entry.build() for entry in chosen)
    if chosen == "gae":
        return chosen
    if chosen in TRANSFORMS.members:  # which is refused with what it needs before it
        return get_transform(chosen)
    found = get_advantage(chosen, field=PLACE)
    return found if is_own_name(chosen) else chosen


def compared_by(chosen: AdvantageConfig) -> tuple[Literal["group", "rollout"], str] | None:
    """Return among what an advantage compares a completion, and the field as messages quote it."""
    name = chosen if isinstance(chosen, str) else str(chosen[0].kind) if chosen else ""
    if name in ("leave_one_out", "group_centred", "group_normalised"):
        return "group", f"{PLACE}={name}"
    return ("rollout", f"{PLACE}={name}") if name == "batch_mean" else None
