"""Hashes of functions and objects in a program, to check that a resumed run uses the same ones."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

__all__ = ["code_identity"]

ADDRESS = re.compile(r"0x[0-9a-f]+")


def code_identity(value: Any) -> str:
    """Return the SHA-256 of a function, or of an object's class and values.

    The hash covers its source, the functions and classes of its module that it uses, default values, closures and
    plain values of the module. It does not cover installed libraries or files that it reads.

    Args:
        value: A function, a class, or an object.
    """
    found: dict[str, str] = {}
    _collect(value, found)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _collect(value: Any, found: dict[str, str]) -> None:
    while isinstance(value, functools.partial):
        found[f"arguments of {value.func!r:.80}".partition(" at ")[0]] = _plain((value.args, value.keywords))
        value = value.func
    if inspect.ismethod(value):
        _collect(value.__self__, found)
    if not (inspect.isroutine(value) or inspect.isclass(value)):
        found[f"values of {type(value).__qualname__}"] = _plain(value)
        value = type(value)
    value = inspect.unwrap(value)
    name = f"{value.__module__}.{value.__qualname__}"
    if name in found:
        return
    found[name] = _source(value)
    for function in _functions(value):
        found[f"{name} {function.__qualname__} defaults"] = _plain((function.__defaults__, function.__kwdefaults__))
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        named = {each: function.__globals__.get(each) for each in _names(function.__code__)}
        for label, inner in [*enumerate(cells), *named.items()]:
            if inspect.isfunction(inner) or inspect.isclass(inner):
                if inner.__module__ == function.__module__:
                    _collect(inner, found)
            elif isinstance(inner, int | float | str | bytes | tuple | frozenset | dict | list):
                found[f"{name} {label}"] = _plain(inner)


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # typed into an interpreter, or without source
        return "".join(_compiled(function.__code__) for function in _functions(value))


def _functions(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, FunctionType):
        yield value
    elif inspect.isclass(value):
        yield from (each for each in vars(value).values() if isinstance(each, FunctionType))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _compiled(code: CodeType) -> str:
    constants = [_compiled(each) if isinstance(each, CodeType) else _plain(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _plain(value: Any) -> str:
    """Return an object's values as text that does not depend on the process."""
    if isinstance(value, Mapping):
        return str({str(key): _plain(inner) for key, inner in value.items()})
    if isinstance(value, set | frozenset):
        return str(sorted(map(_plain, value)))
    if isinstance(value, list | tuple):
        return str([_plain(inner) for inner in value])
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__qualname__
    if type(value).__repr__ is object.__repr__:
        return f"{type(value).__qualname__} {_plain(vars(value)) if '__dict__' in dir(value) else ''}"
    return ADDRESS.sub("", repr(value))
