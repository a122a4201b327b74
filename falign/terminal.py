"""Foreign text (data, prompts, completions, names) on a terminal, where some characters are commands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text
from typing_extensions import override

__all__ = ["Terminal", "harmless", "json_line"]

# Control characters but tab and line feed, C1 controls, and marks that change the direction of text.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    r"""Return a text in which every character that controls a terminal is replaced by a visible symbol.

    Example:
        >>> harmless("\x1b[2Jgone\n\x9b31m\u202e")
        '␛[2Jgone\n�31m�'
    """
    return _COMMANDS.sub(_picture, text)


def json_line(value: Any) -> str:
    r"""Return a value as one line of JSON, in which such characters are escaped.

    Example:
        >>> json_line({"a": "é\x1b\x9b"})
        '{"a": "é\\u001b\\u009b"}'
    """
    return _COMMANDS.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


class Terminal(Console):
    """A console that neutralizes control characters; everything that falign prints goes through it.

    Text is made harmless before it is laid out, and what comes as finished segments afterwards.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(harmless(text), **options)

    @override
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text):
            renderable = _harmless_text(renderable)
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=harmless(segment.text))


def _harmless_text(text: Text) -> Text:
    clean = text.copy()
    clean.plain = harmless(text.plain)  # the same length, so styles keep their positions
    return clean


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"
