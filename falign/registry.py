"""Members of a family by name: the built-in ones, and custom ones as ``module:Name``.

Every family that a run file chooses from (divergences, objectives, references, measures, advantages, rewards, engines,
benchmarks) has one :class:`Registry`. It maps names to members, or to import paths of members that are
loaded at their first use. Looking up ``module:Name`` imports the module and so runs its code. For names that come from
a run folder, :mod:`falign.runs.named_code` decides before the look-up whether that is allowed.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

from falign.choices import nearest
from falign.errors import ConfigError
from falign.raised import code_lines, own_lines, raised_message

__all__ = ["Registry", "import_member", "is_own_name", "own_names_in"]

T = TypeVar("T")

_OWN = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")

_ANYWHERE = re.compile(r"[\w.]+:[\w.]+")


class Registry(Generic[T]):
    """The members of one family.

    Args:
        family: Noun for messages: ``divergence``.
        members: Each name with its member, or with the ``module:Name`` to import it from at its first use.
        aliases: Other spellings, each with its registered name.
        refused: Names that are refused, each with the reason and the remedy.
        beside: Further names for messages, which the callers resolve themselves.
        wanted: Noun phrase for messages that describes a member.
        is_member: Test for imported objects; by default any callable is accepted.

    Example:
        >>> shapes = Registry("shape", {"square": abs, "circle": "math:sqrt"})
        >>> shapes.names(), shapes.get("circle")(4.0)
        (('square', 'circle'), 2.0)
    """

    def __init__(
        self,
        family: str,
        members: Mapping[str, T | str],
        *,
        aliases: Mapping[str, str] | None = None,
        refused: Mapping[str, str] | None = None,
        beside: Sequence[str] = (),
        wanted: str = "callable",
        is_member: Callable[[Any], bool] = callable,
    ) -> None:
        self.family, self.members, self.aliases = family, dict(members), dict(aliases or {})
        self._beside = tuple(beside)
        self._refused, self._wanted, self._is_member = dict(refused or {}), wanted, is_member

    def names(self) -> tuple[str, ...]:
        """Return the names of the built-in members, in the order of the documentation."""
        return tuple(self.members)

    def get(self, name: str, *, field: str | None = None) -> T:
        """Return a member.

        Args:
            name: A name, an alias, or ``module:Name`` of a custom member, which is imported.
            field: The run-file field or option that holds the name, for messages.

        Raises:
            ConfigError: The name is unknown or refused; or a custom member cannot be imported or fails the test.
        """
        place = self._place(name, field)
        if is_own_name(name):
            member = import_member(name, place=place)
            if not self._is_member(member):
                raise ConfigError(f"{place} is a {type(member).__name__}, not a {self._wanted}.")
            return member
        member = self.members[self.name_of(name, field=field)]
        return import_member(member, place=place) if isinstance(member, str) else cast(T, member)

    def name_of(self, name: str, *, field: str | None = None) -> str:
        """Return the registered name that a name or alias stands for.

        Raises:
            ConfigError: The name is unknown or refused.
        """
        key = self.aliases.get(name, name)
        if key in self.members:
            return key
        place = self._place(name, field)
        if key in self._refused:
            raise ConfigError(f"{place}: {self._refused[key]}")
        known = [*self.members, *self._beside]
        close = nearest(key, [*known, *self.aliases])
        hint = f"did you mean {close!r}? Choose" if close else "choose"
        raise ConfigError(f"{place} is unknown; {hint} one of {', '.join(known)}, or give module:Name of your own.")

    def _place(self, name: str, field: str | None) -> str:
        return f"{self.family} {name!r}" if field is None else f"{field}={name!r}"


def is_own_name(name: str) -> bool:
    """Return True if a name has the form ``module:Name``.

    Example:
        >>> is_own_name("my.rewards:polite"), is_own_name("reverse_kl"), is_own_name("Question: why?")
        (True, False, False)
    """
    return _OWN.fullmatch(name) is not None


def own_names_in(value: str) -> list[str]:
    """Return all names of the form ``module:Name`` in a value, including those in parentheses.

    Example:
        >>> own_names_in("divergence_to(my.module:f(0.5))"), own_names_in("divergence_to(alpha(0.5))")
        (['my.module:f'], [])
    """
    return _ANYWHERE.findall(value)


def import_member(name: str, *, place: str, wanted: str = "Name") -> Any:
    """Return the object that ``module:Name`` names.

    Args:
        name: The module as in an import statement; the name may be an attribute of a class (``module:Class.method``).
        place: The place and the value, for messages.
        wanted: Noun for messages that describes the part after the colon.

    Raises:
        ConfigError: The import fails: the object does not exist, or the module raises or exits.
    """
    module, _, attribute = name.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (Exception, SystemExit) as error:  # including SystemExit: a module may do anything when imported
        lines = code_lines(error)
        if not own_lines(lines):
            raise ConfigError(f"{place}: {error}; give an importable module:{wanted}.") from error
        raised = raised_message(f"{type(error).__name__}: {error}", lines, None)
        remedy = (
            "put what the module does as a program under if __name__ == '__main__':."
            if isinstance(error, SystemExit)
            else "correct the module."
        )
        raise ConfigError(f"{place}: {raised}\nIt cannot be imported: {remedy}") from error
    return value
