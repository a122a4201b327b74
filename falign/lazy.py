"""Names of a package that are imported when they are first used (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    package: str, homes: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package whose names are imported at first use.

    So ``falign --help`` does not load torch, and a wrong key in a run file is reported before transformers is loaded.
    Type checkers read the same names from imports under ``TYPE_CHECKING``; a test checks that both agree.

    Args:
        package: ``__name__`` of the package.
        homes: Module to the names that it holds. A module of the package itself with no names stands for its own name.

    Example:
        >>> find, names = lazy_names("falign", {"falign.seeds": ("mixed",), "falign.choices": ()})
        >>> names(), find("mixed").__module__
        (['choices', 'mixed'], 'falign.seeds')
    """
    where = {name: module for module, names in homes.items() for name in names or (module.rpartition(".")[2],)}
    modules = {module.rpartition(".")[2] for module, names in homes.items() if not names}

    def find(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(where[name])
        value = module if name in modules else getattr(module, name)
        setattr(sys.modules[package], name, value)  # so that the next use does not call this function
        return value

    return find, lambda: sorted(where)
