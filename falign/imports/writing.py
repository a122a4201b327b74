"""A run file with comments: where each value comes from, what differs, and what was left out."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from falign.foreign.translation import Translation

__all__ = ["commented"]

ORDER = ("output_dir", "seed", "model", "adapter", "reference", "data", "prompts", "rollout", "rewards", "objective")
WIDTH = 110

_BARE = re.compile(r"[A-Za-z./][\w./()-]*(?::[\w./-]+)?")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", ".nan", ".inf"}
"""Texts that YAML reads as something else."""


def commented(run: Translation, *, source: str, command: str) -> str:
    """Return the text of a run file.

    Args:
        run: The translation.
        source: What it was written from, for the first line.
        command: The command that trains it.
    """
    lines = [f"# From {source}. Train with: {command}"]
    lines += _remarks("Differences", run.differences)
    by_reason: dict[str, list[str]] = {}
    for name, reason in run.unused.items():
        by_reason.setdefault(reason, []).append(name)
    lines += _remarks(
        "Settings without effect on the result, left out",
        [f"{', '.join(names)}: {reason}." for reason, names in by_reason.items()],
    )
    sections = [name for name in ORDER if name in run.values] + [name for name in run.values if name not in ORDER]
    for name in sections:
        lines += _lines(name, run.values[name], run.origins, name, 0)
    return "\n".join(lines) + "\n"


def _remarks(title: str, remarks: Iterable[str]) -> list[str]:
    found = [*remarks]
    wrapped = [
        line
        for remark in found
        for line in textwrap.wrap(remark, WIDTH, initial_indent="#   - ", subsequent_indent="#     ")
    ]
    return [f"# {title}:", *wrapped] if found else []


def _lines(key: str, value: Any, origins: Mapping[str, str], path: str, depth: int) -> list[str]:
    indent, origin = "  " * depth, origins.get(path)
    comment = f"  # {origin}" if origin else ""
    if isinstance(value, dict) and value:
        inner = [
            line for name, each in value.items() for line in _lines(name, each, origins, f"{path}.{name}", depth + 1)
        ]
        return [f"{indent}{key}:{comment}", *inner]
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        items: list[str] = []
        for each in value:
            inner = [line for name, part in each.items() for line in _lines(name, part, origins, "", depth + 2)]
            items.append(f"{inner[0][: 2 * depth + 2]}- {inner[0][2 * depth + 4 :]}")
            items += inner[1:]
        return [f"{indent}{key}:{comment}", *items]
    return [f"{indent}{key}: {_plain(value)}{comment}"]


def _plain(value: Any) -> str:
    """Return a value in YAML: JSON is YAML, except that YAML reads 1e-05 as a text."""
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, float) and "e" in (text := repr(value)):
        mantissa, exponent = text.split("e")
        return f"{mantissa if '.' in mantissa else f'{mantissa}.0'}e{exponent}"
    if isinstance(value, str) and _BARE.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
