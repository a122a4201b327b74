"""Hashes of functions and objects in a program, to check that a resumed run uses the same ones."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
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

    The hash covers its code with decorators and base classes, the functions, classes and objects of its module that it
    uses, default values, closures, and its values: functions, tensors and arrays among them with all that they hold. It
    does not cover comments and docstrings (see :func:`plain_code`), installed libraries, other modules, or files that
    it reads. The hash of a lambda, and of code without a source file, depends on the version of Python.

    Args:
        value: A function, a class, or an object.
    """
    collected = _Collected("read")
    collected.add(value)
    if reads_docstrings(collected.found.values()):
        collected = _Collected("all")
        collected.add(value)
    return hashlib.sha256(json.dumps(collected.found, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


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


class _Collected:
    """The code and the values that an object is made of, as text by name.

    Args:
        docstrings: The docstrings to keep.
    """

    def __init__(self, docstrings: Kept) -> None:
        self.docstrings: Kept = docstrings
        self.found: dict[str, str] = {}
        self._kept: dict[int, Any] = {}  # what has been collected; kept alive, so that no id is used twice
        self._open: set[int] = set()

    def add(self, value: Any) -> None:
        """Collect a function with what it uses, or an object with its class."""
        while isinstance(value, functools.partial):
            label = f"arguments of {value.func!r:.80}".partition(" at ")[0]
            self.found[label] = self.text((value.args, value.keywords))
            value = value.func
        if inspect.ismethod(value):
            self.add(value.__self__)
        if not (inspect.isroutine(value) or inspect.isclass(value)):
            self.found[f"values of {type(value).__qualname__}"] = self.text(value)
            value = type(value)
        self._add_code(value)

    def _add_code(self, value: Any) -> None:
        for wrapper in _wrappers(value):
            if wrapper.__globals__.get("__name__") == value.__module__:
                code = inspect.getsource(wrapper.__code__) if _is_readable(wrapper.__code__) else ""
                self.found[f"{value.__module__}.{value.__qualname__} in {wrapper.__code__.co_name}"] = plain_code(
                    f"if True:\n{code}" if code[:1].isspace() else code, docstrings=self.docstrings
                ) or _compiled(wrapper.__code__, self.docstrings)
                self._add_used(f"{value.__qualname__} in {wrapper.__code__.co_name}", wrapper)
        value = inspect.unwrap(value)
        if id(value) in self._kept:
            return
        source = _source(value, self.docstrings)
        name = f"{value.__module__}.{value.__qualname__}"
        name += f" {source}" if _is_lambda(value) else ""  # all lambdas of a scope have one name
        while name in self.found:  # made by the same code, with other values
            name += "'"
        self._kept[id(value)] = value
        self.found[name] = source
        for base in value.__mro__[1:] if inspect.isclass(value) else ():
            if base.__module__ == value.__module__:
                self._add_code(base)
        for function in _functions(value):
            defaults = self.text((function.__defaults__, function.__kwdefaults__))
            self.found[f"{name} {function.__qualname__} defaults"] = defaults
            self._add_used(name, function)

    def _add_used(self, name: str, function: FunctionType) -> None:
        cells = []
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # not assigned yet
                cells.append(cell.cell_contents)
        named = {each: function.__globals__.get(each) for each in _names(function.__code__)}
        module = function.__globals__.get("__name__")
        for label, inner in [*enumerate(cells), *named.items()]:
            code = inspect.unwrap(inner) if isinstance(inner, CALLED) else inner
            if inspect.isfunction(code) or inspect.isclass(code):
                if code.__module__ == module or (isinstance(label, int) and _is_own(code)):
                    self._add_code(inner)
            elif isinstance(inner, DATA) or _content(inner) is not None or is_dataclass(inner) or _is_own(type(inner)):
                self.found[f"{name} {label}"] = self.text(inner)

    def text(self, value: Any) -> str:
        """Return a value as text that does not depend on the process, and collect the code in it."""
        if id(value) in self._open:
            return "itself"
        self._open.add(id(value))
        try:
            return self._text(value)
        finally:
            self._open.discard(id(value))

    def _text(self, value: Any) -> str:
        if isinstance(value, Mapping):
            return str({str(key): self.text(inner) for key, inner in value.items()})
        if isinstance(value, set | frozenset):
            return str(sorted(map(self.text, value)))
        if isinstance(value, list | tuple):
            return str([self.text(inner) for inner in value])
        if isinstance(value, functools.partial):
            return self.text((value.func, value.args, value.keywords))
        if inspect.isroutine(value) or inspect.isclass(value):
            return self._text_of_code(value)
        return self._text_of_object(value)

    def _text_of_code(self, value: Any) -> str:
        if inspect.ismethod(value):
            return f"{value.__qualname__} {self.text(value.__self__)}"
        code = inspect.unwrap(value)
        if not (_is_own(code) and (inspect.isfunction(code) or inspect.isclass(code))):
            return value.__qualname__
        self._add_code(value)
        return f"{value.__qualname__} {_source(code, self.docstrings)}"

    def _text_of_object(self, value: Any) -> str:
        name = type(value).__qualname__
        if _is_own(type(value)):
            self._add_code(type(value))
        if (content := _content(value)) is not None:
            return content
        # Not its repr, which has only the names of functions among the fields. Fields left out of == may be caches.
        if is_dataclass(value):
            compared = {each.name: getattr(value, each.name, None) for each in fields(value) if each.compare}
            return f"{name} {self.text(compared)}"
        if type(value).__repr__ is object.__repr__:
            return f"{name} {self.text(_attributes(value))}"
        return ADDRESS.sub("", repr(value))


DATA = (int, float, str, bytes, tuple, frozenset, set, dict, list, functools.partial)
"""Values of a module that count if a function names them."""

CALLED = (FunctionType, type(functools.lru_cache(lambda: None)))
"""Functions, and functions with a cache."""

NOT_OWN = frozenset({"falign", "builtins", "torch", "numpy", "transformers", "__future__"})


def _is_own(member: Any) -> bool:
    """Return whether a function or class is the user's: neither of falign nor of an installed library."""
    outermost = str(getattr(member, "__module__", None) or "builtins").partition(".")[0]
    if outermost in NOT_OWN or outermost in sys.stdlib_module_names - {"__main__"}:
        return False
    file = getattr(sys.modules.get(outermost), "__file__", None)
    return file is None or not any(Path(file).is_relative_to(place) for place in _INSTALLED)


_INSTALLED = frozenset(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def _content(value: Any) -> str | None:
    """Return the whole content of a tensor, an array or a torch module, whose texts leave out most of it."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.nn.Module):
        parts = {name: _content(each) or ADDRESS.sub("", repr(each)) for name, each in value.state_dict().items()}
        return f"{ADDRESS.sub('', repr(value))} {parts}"
    if torch is not None and isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        content = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        return f"{plain.dtype} {tuple(plain.shape)} {hashlib.sha256(content).hexdigest()}"
    if numpy is not None and isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return None


def _attributes(value: Any) -> dict[str, Any]:
    """Return the values of an object; those that it computes at first use and keeps are not its own."""
    slots = [name for each in type(value).__mro__ for name in _listed(vars(each).get("__slots__", ()))]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name) and not name.startswith("__")}
    found |= vars(value) if hasattr(value, "__dict__") else {}
    computed = functools.cached_property
    return {k: v for k, v in found.items() if not isinstance(inspect.getattr_static(type(value), k, None), computed)}


def _listed(names: str | Iterable[str]) -> Iterable[str]:
    return (names,) if isinstance(names, str) else names


def _wrappers(value: Any) -> Iterator[FunctionType]:
    """Yield the functions that decorators have put around a function."""
    while hasattr(value, "__wrapped__") and not inspect.isclass(value):
        if isinstance(value, FunctionType):
            yield value
        value = value.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]


def _is_readable(code: CodeType) -> bool:
    with suppress(OSError, TypeError, SyntaxError):
        source = inspect.getsource(code)
        ast.parse(f"if True:\n{source}" if source[:1].isspace() else source)
        return True
    return False


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
        for member in vars(value).values():
            inner = (member.fget, member.fset) if isinstance(member, property) else (member,)
            for each in inner:
                plain = getattr(each, "__func__", None) or getattr(each, "func", None) or each
                if isinstance(plain, FunctionType):
                    yield plain


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _compiled(code: CodeType, docstrings: Kept) -> str:
    constants = code.co_consts
    if docstrings != "all" and _has_docstring(code):
        constants = (None, *constants[1:])
    inner = [_compiled(each, docstrings) if isinstance(each, CodeType) else _constant(each) for each in constants]
    # Names of arguments count, because rewards are called by them.
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars} {inner}"


def _has_docstring(code: CodeType) -> bool:
    """Return whether the first constant of compiled code is the docstring of its function."""
    if sys.version_info >= (3, 13):
        return bool(code.co_flags & inspect.CO_HAS_DOCSTRING)
    # Earlier, a function without docstring has None there; lambdas and comprehensions have names in angle brackets.
    return not code.co_name.startswith("<") and isinstance(next(iter(code.co_consts), None), str)


def _constant(value: Any) -> str:
    """Return a constant of compiled code as text that does not depend on the process."""
    if isinstance(value, frozenset):
        return str(sorted(map(_constant, value)))
    return str([_constant(each) for each in value]) if isinstance(value, tuple) else repr(value)
