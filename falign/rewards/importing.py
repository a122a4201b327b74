"""Functions given as ``module:function``."""

from __future__ import annotations

import importlib
from typing import Any

from falign.errors import ConfigError

__all__ = ["import_function"]


def import_function(name: str) -> Any:
    """Return what ``module:function`` names.

    Args:
        name: The module as in an import statement; the function may be an attribute of a class.

    Raises:
        ConfigError: It cannot be imported, or cannot be called.
    """
    module, _, attribute = name.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(f"reward {name!r}: {error}; give an importable module:function.") from error
    if not callable(value):
        raise ConfigError(f"reward {name!r} is a {type(value).__name__}; it must be callable.")
    return value
