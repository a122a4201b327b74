"""Text from other sources (data, prompts, completions, names) on a terminal, where some characters are commands."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text
from typing_extensions import override

__all__ = [
    "BAR",
    "Terminal",
    "harmless",
    "json_line",
    "progress",
]


SECONDS_BETWEEN_LINES = 30.0

BAR = (
    TextColumn("[bold]{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("eta"),
    TimeRemainingColumn(),
)

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


@contextmanager
def progress(console: Console, unit: str, *, total: int | None = None, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show how much is done while the block runs: a bar on a terminal, elsewhere a line now and then.

    Args:
        console: Where it is shown.
        unit: What is counted, in the plural.
        total: How many there are, as far as that is known.
        done: How many an earlier call has done.

    Yields:
        A function of the number done so far, and of anything more to say on a line (``more=``); a ``total=`` that was
        not known before may come with it.
    """
    last_line = time.monotonic()
    with Progress(*BAR, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(unit, total=total, completed=done)

        def update(done: int, *, total: int | None = total, more: str = "") -> None:
            nonlocal last_line
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                console.print(f"{done:,}{'' if total is None else f' of {total:,}'} {unit}{more}", highlight=False)

        yield update


def _harmless_text(text: Text) -> Text:
    clean = text.copy()
    clean.plain = harmless(text.plain)  # the same length, so styles keep their positions
    return clean


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"
