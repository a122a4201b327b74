"""YAML as plain values; refuses invalid, recursive and excessively large documents."""

from __future__ import annotations

from typing import Any

import yaml
from typing_extensions import override

from falign.errors import ConfigError

__all__ = ["plain_yaml"]

MOST_VALUES = 1_000_000
"""The maximum number of values of a document with its aliases expanded; run files have far fewer."""


class _GivenTwiceError(yaml.YAMLError):
    """A duplicate key, and its lines."""


class _UniqueKeys(yaml.SafeLoader):
    """A loader for which a repeated key is an error, as in the standard; PyYAML drops the first."""

    @override
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            first = seen.setdefault((key.tag, key.value), key)
            if first is not key:
                raise _GivenTwiceError(key.value, first.start_mark.line + 1, key.start_mark.line + 1)
        return node


def plain_yaml(text: str, *, place: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: One YAML document.
        place: What messages call it.

    Raises:
        ConfigError: It is not YAML, a key comes twice in a section, or it cannot be written without aliases.
    """
    try:
        value = yaml.load(text, Loader=_UniqueKeys)
        size = _size(value, {})
    except _GivenTwiceError as error:
        key, first, second = error.args
        lines = f" (lines {first} and {second})" if "\n" in text else ""
        raise ConfigError(f"{place} has {key!r} twice in one section{lines}: merge the two into one.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        raise ConfigError(f"{place}{line} is not YAML: {getattr(error, 'problem', None) or error}.") from error
    except RecursionError as error:
        raise ConfigError(f"{place} is nested too deeply, or contains itself: write it without aliases.") from error
    except (ValueError, OverflowError, AttributeError, KeyError) as error:  # an invalid date or number
        raise ConfigError(f"{place} is not YAML: a value of it cannot be read ({error}); put it in quotes.") from error
    if size > MOST_VALUES:
        raise ConfigError(f"{place} has more than {MOST_VALUES:,} values by its aliases: write it without them.")
    return value


def _size(value: Any, known: dict[int, int]) -> int:
    """Count values, with those of an alias at each occurrence; a recursive value exceeds the recursion limit."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(each, known) for each in inner)
    return known[id(value)]
