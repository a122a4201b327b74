"""Sections of the members of a family: a field's union of kinds, and sections made from a signature.

The field ``kind`` of a section names its member: a built-in one, or ``module:Name`` of a user's own. An own member
gets the other keys of the section as arguments, which are checked against its signature when it is built. It is
imported only then, after :mod:`falign.runs.named_code` has decided whether it may be.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, create_model
from pydantic.fields import FieldInfo

from falign.choices import nearest, shown
from falign.errors import ConfigError
from falign.registry import Registry, is_own_name
from falign.runfile.base_config import FrozenModel, named_divergence

__all__ = ["LIST", "OWN", "TEXT", "OwnSection", "call_with_settings", "section_of", "text_or", "union_of_kinds"]

OWN = "module:Name"
"""The kind under which messages list own members."""


class OwnSection(FrozenModel, extra="allow"):
    """A member of your own; its other keys are the arguments of ``module:Name``.

    A subclass with a further base must set ``extra="allow"`` itself, because pydantic takes this from the last base.
    """

    kind: str = OWN

    def make(self, registry: Registry[Any], *, place: str, protocol: type[Any], **given: Any) -> Any:
        """Import the member and call it with the section's settings.

        Args:
            registry: The family.
            place: The path of the section, for messages.
            protocol: The class that the result must have.
            given: Arguments that the run adds; a member gets those that its signature names.

        Raises:
            ConfigError: It cannot be imported, does not take these settings, or does not fit the protocol.
        """
        member = registry.get(self.kind, field=f"{place}.kind")
        made = call_with_settings(member, self.model_extra or {}, name=self.kind, place=place, given=given)
        if not isinstance(made, protocol):
            needed = ", ".join(sorted(getattr(protocol, "__abstractmethods__", None) or _members(protocol)))
            base = f"it must be a subclass of falign's {protocol.__name__} that defines"
            raise ConfigError(
                f"{place}.kind={self.kind!r} makes a {type(made).__name__}, which is not a falign {protocol.__name__}: "
                f"{base if inspect.isabstract(protocol) else 'it needs'} {needed}."
            )
        return made


def _members(protocol: type[Any]) -> set[str]:
    return {name for name in vars(protocol) if not name.startswith("_")} | {"__call__"} & set(vars(protocol))


TEXT = "text"
"""The tag of a value that is a text in place of a section or a list."""

LIST = "list"
"""The tag of a list in whose place a text may stand."""


def union_of_kinds(
    sections: Mapping[str, type[BaseModel]], *, default: str | None = None, own: Any = None, text: bool = False
) -> Any:
    """Return the annotation of a field that holds one of several sections.

    Args:
        sections: Each kind with its section.
        default: The kind of a section without ``kind``; None if it is required.
        own: The section of users' members, a subclass of :class:`OwnSection`; None if the family allows none.
        text: Whether a text is a valid value, too; the field then holds the text.
    """

    def kind_of(value: Any) -> str | None:
        if text and isinstance(value, str):
            return TEXT
        if isinstance(value, dict):
            if "kind" not in value:
                return default
            kind = str(value["kind"])
        else:  # a section, or a value of the wrong type, which every section refuses
            kind = str(getattr(value, "kind", default or next(iter(sections))))
        return OWN if own is not None and is_own_name(kind) else kind

    members = [Annotated[section, Tag(kind)] for kind, section in sections.items()]
    members += [] if own is None else [Annotated[own, Tag(OWN)]]
    members += [Annotated[str, Tag(TEXT)]] if text else []
    return Annotated[Union[tuple(members)], Discriminator(kind_of)]  # noqa: UP007


def text_or(listed: Any) -> Any:
    """Return the annotation of a field that holds a text or a list.

    Without the tags, pydantic would report each mistake in the list also as a value that is not a text.

    Args:
        listed: The annotation of the list, such as ``list[str]`` or ``tuple[Section, ...]``.
    """

    def form_of(value: Any) -> str:
        return TEXT if isinstance(value, str) else LIST

    members = Annotated[str, Tag(TEXT)], Annotated[listed, Tag(LIST)]
    return Annotated[Union[members], Discriminator(form_of)]  # noqa: UP007


def section_of(member: Callable[..., Any], *, kind: str, base: type[BaseModel], **fields: Any) -> type[Any]:
    """Return the section of a built-in member, made from its signature and docstring.

    Args:
        member: The function or class that the section calls; its parameters become the fields, and its ``Args`` their
            documentation.
        kind: The name in the run file.
        base: The class of the section.
        fields: Further fields as for ``pydantic.create_model``, or other annotations of parameters.
    """
    summary = (inspect.getdoc(member) or "").partition("\n")[0]
    made: dict[str, Any] = {"kind": (Literal[kind], kind)}  # pyright: ignore[reportInvalidTypeForm]
    made |= {name: _field(each, member) for name, each in _parameters(member).items() if name not in base.model_fields}
    name = "".join(part.capitalize() for part in kind.split("_")) + "Config"
    # The member documents the fields. Searching for the class's source, which does not exist, takes longer than making
    # all other classes of the run file.
    no_source = {"use_attribute_docstrings": False}
    return create_model(
        name, __base__=base, __cls_kwargs__=no_source, __doc__=summary, __module__=__name__, **(made | fields)
    )


def call_with_settings(
    member: Callable[..., Any],
    settings: Mapping[str, Any],
    *,
    name: str,
    place: str,
    key: str = "kind",
    given: Mapping[str, Any] | None = None,
) -> Any:
    """Call an own member with settings of a run file, after checking them against its signature.

    If the member is a pydantic model, the settings are its fields, and its ``build`` gets the arguments of the run.

    Args:
        member: A class or function.
        settings: The section's keys without ``key``.
        name: The member's name in messages.
        place: The path of the section, for messages.
        key: The section's key that names the member, for messages.
        given: Arguments that the run adds if the signature names them.

    Raises:
        ConfigError: A setting is unknown, missing or of another type, or the member refuses it.
    """
    given = given or {}
    if inspect.isclass(member) and issubclass(member, BaseModel):
        made: Any = _validated(member, settings, name=name, place=place)
        return made.build(**_named(made.build, given))
    added = _named(member, given)
    try:
        parameters = {key: each for key, each in _parameters(member).items() if key not in added}
        takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        fields: dict[str, Any] = {
            key: _field(each, member)
            for key, each in parameters.items()
            if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        }
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"{place}.{key}={name!r}: its signature cannot be read: {error}.") from error
    base = create_model("Settings", __config__=ConfigDict(extra="allow" if takes_all else "forbid", **_LOOSE), **fields)
    validated = _validated(base, settings, name=name, place=place)
    arguments = {key: getattr(validated, key) for key in validated.model_fields_set}
    try:
        return member(**added, **arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{place}.{key}={name!r}: {error}") from error


_LOOSE: Any = {"arbitrary_types_allowed": True, "allow_inf_nan": False, "protected_namespaces": ()}


def _parameters(member: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    function = member.__init__ if inspect.isclass(member) else inspect.unwrap(member)
    # A class without __init__ has that of object, which has no module.
    module = getattr(function, "__module__", None) or member.__module__
    names = vars(sys.modules[module])
    # Not the return annotation: its names may be imported for type checkers only.
    return {
        name: each.replace(annotation=eval(each.annotation, names)) if isinstance(each.annotation, str) else each
        for name, each in inspect.signature(member).parameters.items()
    }


def _named(member: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(member).parameters
    return {key: value for key, value in given.items() if key in known}


def _field(parameter: inspect.Parameter, member: Callable[..., Any]) -> tuple[Any, FieldInfo]:
    from falign.divergences import Divergence

    empty = parameter.empty
    annotation = Any if parameter.annotation is empty else parameter.annotation
    alternatives: list[Any] = [annotation, *get_args(annotation)]
    if any(inspect.isclass(each) and issubclass(each, Divergence) for each in alternatives):
        annotation = Annotated[annotation, BeforeValidator(_divergence)]
    default = ... if parameter.default is empty else parameter.default
    return annotation, Field(default=default, description=_argument_docs(member).get(parameter.name))


def _divergence(value: Any) -> Any:
    return named_divergence(value, field="divergence") if isinstance(value, str) else value


def _argument_docs(member: Callable[..., Any]) -> dict[str, str]:
    """Return the text of each argument in a Google-style docstring."""
    section = re.search(r"^(?:Args|Attributes):\n((?:[ ]{4}.*\n?|\n)+)", inspect.getdoc(member) or "", re.MULTILINE)
    if section is None:
        return {}
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", section[1], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _validated(model: type[BaseModel], settings: Mapping[str, Any], *, name: str, place: str) -> BaseModel:
    try:
        return model.model_validate(dict(settings))
    except ValidationError as error:
        known = list(model.model_fields)
        messages = [_message(detail, known, name=name, place=place) for detail in error.errors(include_url=False)]
        raise ConfigError("\n  ".join(messages)) from error


def _message(detail: Any, known: Collection[str], *, name: str, place: str) -> str:
    path = ".".join([place, *(str(step) for step in detail["loc"])])
    if detail["type"] == "extra_forbidden":
        close = nearest(str(detail["loc"][-1]), known)
        hint = f"; did you mean {close}?" if close else ""
        settings = ", ".join(known) or "none"
        return (
            f"unknown key {path!r}{hint} The settings of {name} are: {settings}."
            if hint
            else (f"unknown key {path!r}: the settings of {name} are: {settings}.")
        )
    if detail["type"] == "missing":
        return f"{path} is required by {name}."
    return f"{path}={shown(detail['input'])}: {detail['msg'].removeprefix('Value error, ')}."
