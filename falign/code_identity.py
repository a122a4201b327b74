"""Hashes of functions and objects in a program, to check that a resumed run uses the same ones."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import CodeType, FunctionType
from typing import Any, Literal

__all__ = ["Kept", "code_identity", "plain_code", "reads_docstrings"]

ADDRESS = re.compile(r"0x[0-9a-f]+")
Kept = Literal["all", "read", "none"]
"""Which docstrings count as code."""
SILENT = frozenset(
    {
        *("abstractmethod", "cache", "cached_property", "classmethod", "contextmanager", "dataclass", "lru_cache"),
        *("no_grad", "overload", "override", "property", "runtime_checkable", "staticmethod", "wraps"),
        *("ABC", "Enum", "Exception", "Generic", "IntEnum", "NamedTuple", "Protocol", "StrEnum", "TypedDict", "object"),
        *("RuntimeError", "TypeError", "ValueError", "Module", "Divergence", "Objective", "Reference", "Reward"),
    }
)
"""Decorators and base classes that do not read docstrings."""


def code_identity(value: Any) -> str:
    """Return the SHA-256 of a function, or of an object's class and values.

    The hash covers its code, the functions and classes of its module that it uses, default values, closures and
    plain values of the module. It does not cover comments and docstrings (see :func:`plain_code`), installed libraries
    or files that it reads. The hash of a lambda, and of code without a source file, depends on the version of Python.

    Args:
        value: A function, a class, or an object.
    """
    found: dict[str, str] = {}
    _collect(value, found, "read")
    if reads_docstrings(found.values()):
        found = {}
        _collect(value, found, "all")
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def plain_code(source: str | bytes, *, docstrings: Kept = "read") -> str:
    r"""Return code in one normal form, without comments and docstrings, which do not change its results.

    Args:
        source: Source of a module, or of one definition.
        docstrings: The docstrings to keep. ``read``: those of functions and classes with a decorator or base class that
            is not known to ignore them, because libraries take prompts from there; ``all``; ``none``.

    Raises:
        SyntaxError: It is not Python.

    Example:
        >>> print(plain_code('def half(x):\n    "Half."  # of x\n    return x / 2'))
        def half(x):
            return x / 2
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            docstrings == "none" or (docstrings == "read" and not _may_be_read(node))
        ):
            _drop_strings(node)
    return ast.unparse(tree)


def reads_docstrings(code: Iterable[str]) -> bool:
    """Return whether some code reads docstrings, which are then part of what it does."""
    return any("__doc__" in each or "getdoc" in each for each in code)


def _may_be_read(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a decorator or a base class may use the docstring of a definition."""
    if isinstance(node, ast.Module):
        return False
    users = [*node.decorator_list, *(node.bases if isinstance(node, ast.ClassDef) else ())]
    return not all(_last_name(user) in SILENT for user in users)


def _last_name(node: ast.expr) -> str:
    """Return ``c`` of ``a.b.c``, ``c(...)`` and ``c[...]``; ``""`` for other expressions."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _drop_strings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    """Drop statements that are only a text: docstrings, those of attributes among them."""
    kept = [each for each in node.body if not (isinstance(each, ast.Expr) and _is_text(each.value))]
    # A body that was only a docstring still needs a statement.
    node.body = kept or ([] if isinstance(node, ast.Module) else [ast.Pass()])


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _collect(value: Any, found: dict[str, str], docstrings: Kept) -> None:
    while isinstance(value, functools.partial):
        found[f"arguments of {value.func!r:.80}".partition(" at ")[0]] = _plain((value.args, value.keywords))
        value = value.func
    if inspect.ismethod(value):
        _collect(value.__self__, found, docstrings)
    if not (inspect.isroutine(value) or inspect.isclass(value)):
        found[f"values of {type(value).__qualname__}"] = _plain(value)
        value = type(value)
    value = inspect.unwrap(value)
    source = _source(value, docstrings)
    name = f"{value.__module__}.{value.__qualname__}"
    name += f" {source}" if _is_lambda(value) else ""  # all lambdas of a scope have one name
    if name in found:
        return
    found[name] = source
    for function in _functions(value):
        found[f"{name} {function.__qualname__} defaults"] = _plain((function.__defaults__, function.__kwdefaults__))
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        named = {each: function.__globals__.get(each) for each in _names(function.__code__)}
        for label, inner in [*enumerate(cells), *named.items()]:
            if inspect.isfunction(inner) or inspect.isclass(inner):
                if inner.__module__ == function.__module__:
                    _collect(inner, found, docstrings)
            elif isinstance(inner, int | float | str | bytes | tuple | frozenset | dict | list):
                found[f"{name} {label}"] = _plain(inner)


def _source(value: Any, docstrings: Kept) -> str:
    if not _is_lambda(value):  # whose source is the whole line that holds it, which may hold others
        # Without source (typed into an interpreter), or with one that has changed since it was imported.
        with suppress(OSError, TypeError, SyntaxError):
            source = inspect.getsource(value)
            # Under a condition, an indented definition can be read; dedenting would also change the strings in it.
            return plain_code(f"if True:\n{source}" if source[:1].isspace() else source, docstrings=docstrings)
    return "".join(_compiled(function.__code__, docstrings) for function in _functions(value))


def _is_lambda(value: Any) -> bool:
    return inspect.isfunction(value) and value.__name__ == "<lambda>"


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


def _compiled(code: CodeType, docstrings: Kept) -> str:
    constants = code.co_consts
    if docstrings != "all" and _has_docstring(code):
        constants = (None, *constants[1:])
    inner = [_compiled(each, docstrings) if isinstance(each, CodeType) else _plain(each) for each in constants]
    # Names of arguments count, because rewards are called by them.
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars} {inner}"


def _has_docstring(code: CodeType) -> bool:
    """Return whether the first constant of compiled code is the docstring of its function."""
    if sys.version_info >= (3, 13):
        return bool(code.co_flags & inspect.CO_HAS_DOCSTRING)
    # Earlier, a function without docstring has None there; lambdas and comprehensions have names in angle brackets.
    return not code.co_name.startswith("<") and isinstance(next(iter(code.co_consts), None), str)


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
