"""YAML as plain values: what is no YAML, has no end, or is far larger than its text is refused alike."""

from __future__ import annotations

from typing import Any

import yaml

from falign.errors import ConfigError

__all__ = ["plain_yaml"]

MOST_VALUES = 1_000_000
"""Of a document with all its aliases written out: more of them are nobody's run file."""


def plain_yaml(text: str, *, place: str) -> Any:
    """Return what a text holds.

    Args:
        text: One YAML document.
        place: What messages call it.

    Raises:
        ConfigError: It is not YAML, or it cannot be written without aliases.
    """
    try:
        value = yaml.safe_load(text)
        size = _size(value, {})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        raise ConfigError(f"{place}{line} is not YAML: {getattr(error, 'problem', None) or error}.") from error
    except RecursionError as error:
        raise ConfigError(f"{place} is nested too deeply, or holds itself: write it without aliases.") from error
    except (ValueError, OverflowError, AttributeError, KeyError) as error:  # a date or a number that is none
        raise ConfigError(f"{place} is not YAML: a value of it cannot be read ({error}); put it in quotes.") from error
    if size > MOST_VALUES:
        raise ConfigError(f"{place} has more than {MOST_VALUES:,} values by its aliases: write it without them.")
    return value


def _size(value: Any, known: dict[int, int]) -> int:
    """Count values, those of an alias each time it occurs; one that holds itself goes too deep."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(each, known) for each in inner)
    return known[id(value)]
