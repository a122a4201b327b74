"""A check of the numbers in frozen dataclasses, and of their names in messages, for all families that have such fields.

A text such as ``"0.1"`` in place of a number would otherwise be a TypeError of the first comparison, without the field.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from falign.choices import shown

__all__ = ["NumericFields", "named_as", "numeric_arguments"]

P = ParamSpec("P")
R = TypeVar("R")

_KINDS: dict[str, tuple[type[Any], str]] = {"float": (Real, "a number"), "int": (Integral, "a whole number")}


class NumericFields:
    """Base of dataclasses whose ``float`` and ``int`` fields are checked before ``__post_init__`` reads them.

    Raises:
        ValueError: A field, or an item of a tuple of numbers, is not a number; the message has its name and value.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Clip(NumericFields):
        ...     low: float = 0.2
        ...     steps: int | None = None
        >>> Clip("0.1")
        Traceback (most recent call last):
        ValueError: low='0.1' is a str; it must be a number.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = vars(cls).get("__post_init__")
        if own is not None:

            @functools.wraps(own)
            def checked(self: Any) -> None:
                NumericFields.__post_init__(self)
                own(self)

            cls.__post_init__ = checked

    def __post_init__(self) -> None:
        for field in fields(self) if is_dataclass(self) else ():
            _check(field.name, getattr(self, field.name), field.type)


def numeric_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Check the ``float`` and ``int`` arguments of a constructor before it reads them.

    Raises:
        ValueError: By the constructor, as for :class:`NumericFields`.

    Example:
        >>> @numeric_arguments
        ... def halved(beta: float = 0.1) -> float:
        ...     return beta / 2
        >>> halved("0.1")
        Traceback (most recent call last):
        ValueError: beta='0.1' is a str; it must be a number.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _check(name, value, signature.parameters[name].annotation)
        return function(*args, **kwargs)

    return checked


def _check(name: str, value: Any, annotation: Any) -> None:
    """Check a value by its annotation, which is a text, or a type where a user's module evaluates it."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if value is None and text.endswith("| None"):
        return
    plain = text.removesuffix("| None").strip()
    if plain in _KINDS:
        _require(name, value, plain)
    elif plain == "tuple[float, ...]" and isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _require(f"{name}[{number}]", item, "float")


def _require(name: str, value: Any, annotation: str) -> None:
    kind, wanted = _KINDS[annotation]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} is a {type(value).__name__}; it must be {wanted}.")


@contextmanager
def named_as(**names: str) -> Iterator[None]:
    """Write fields in messages as the caller of a constructor has written them.

    Args:
        **names: The caller's name for each field.

    Example:
        >>> with named_as(weighting="mask"):
        ...     raise ValueError("weighting='tokens': choose one of mapo, learned.")
        Traceback (most recent call last):
        ValueError: mask='tokens': choose one of mapo, learned.
    """
    try:
        yield
    except ValueError as error:
        known = "|".join(map(re.escape, names))
        message = re.sub(rf"\b({known})\b", lambda match: names[match[1]], str(error))
        raise type(error)(message) from error
