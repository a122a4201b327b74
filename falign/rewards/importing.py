"""Functions given as ``module:function``."""

from __future__ import annotations

import importlib
from typing import Any

from falign.errors import ConfigError
from falign.rewards.raised import code_lines, own_lines, raised_message

__all__ = ["import_attribute", "import_function"]


def import_function(name: str) -> Any:
    """Return what ``module:function`` names.

    Args:
        name: The module as in an import statement; the function may be an attribute of a class.

    Raises:
        ConfigError: It cannot be imported, or cannot be called.
    """
    value = import_attribute(name, given=f"reward {name!r}", wanted="function")
    if not callable(value):
        raise ConfigError(f"reward {name!r} is a {type(value).__name__}; it must be callable.")
    return value


def import_attribute(name: str, *, given: str, wanted: str) -> Any:
    """Return what ``module:attribute`` names.

    Args:
        name: The module as in an import statement; the attribute may be one of a class.
        given: The place and the value, for messages.
        wanted: What the attribute is, for messages.

    Raises:
        ConfigError: It cannot be imported: it is not there, or the module raises, or ends the program.
    """
    module, _, attribute = name.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        lines = code_lines(error)
        if not own_lines(lines):
            raise ConfigError(f"{given}: {error}; give an importable module:{wanted}.") from error
        raised = raised_message(f"{type(error).__name__}: {error}", lines, None)
        remedy = (
            "put what the module does as a program under if __name__ == '__main__':."
            if isinstance(error, SystemExit)
            else "mend the module."
        )
        raise ConfigError(f"{given}: {raised}\nIt cannot be imported: {remedy}") from error
    return value
