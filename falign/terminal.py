"""Text for a terminal or a log: without secrets, and without characters that command the terminal."""

from __future__ import annotations

import json
import os
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
    "holds_secret",
    "json_line",
    "progress",
    "refuse_passwords",
    "without_passwords",
    "without_secrets",
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
    told = time.monotonic()
    with Progress(*BAR, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(unit, total=total, completed=done)

        def update(done: int, *, total: int | None = total, more: str = "") -> None:
            nonlocal told
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - told > SECONDS_BETWEEN_LINES:
                told = time.monotonic()
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


_SECRET = r"(?:password|passwd|secret|token|credentials?|api_?key|access_?key|private_?key|signature|sig)"
NAMES = re.compile(rf"(?:^|[_-]){_SECRET}$", re.IGNORECASE)

# pathlib collapses two slashes into one.
IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]+:/{1,2})[^\s/@\"'<>?#]+@", re.IGNORECASE)
IN_QUERY = re.compile(rf"([?&](?:[\w-]*[_-])?{_SECRET}=)[^\s&#\"'<>]+", re.IGNORECASE)
# Prefixes of tokens of Hugging Face, GitHub, GitLab, OpenAI and others.
TOKENS = re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[bap]-)[A-Za-z0-9_-]{16,}")

SHORTEST_SECRET = 8  # characters; a shorter one would occur in ordinary words


def without_passwords(text: str) -> str:
    """Return a text in which the user of each URL, secrets of its query, and known kinds of tokens are ``***``."""
    return TOKENS.sub("***", IN_QUERY.sub(r"\1***", IN_URL.sub(r"\1***@", text)))


def without_secrets(text: str) -> str:
    """Return :func:`without_passwords`, also without the values of environment variables named like a secret."""
    secrets = {value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= SHORTEST_SECRET}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return without_passwords(text)


def holds_secret(text: str) -> bool:
    """Return whether a text contains something that :func:`without_passwords` masks."""
    return without_passwords(text) != text


def refuse_passwords(values: Any, *, place: str) -> None:
    """Refuse a run file that holds a password or a token: it is copied into the run folder.

    Args:
        values: The run file as plain values.
        place: What messages call it.

    Raises:
        ConfigError: With the field, and never with its value.
    """
    from falign.errors import ConfigError  # here, because falign.errors imports this module

    for path, key, value in _texts(values):
        if NAMES.search(key) and value:
            raise ConfigError(
                f"{place}: {path} is a secret by its name, and run files are copied into run folders: leave it out, "
                "and set it in the environment (HF_TOKEN, WANDB_API_KEY ...)."
            )
        if holds_secret(value):
            kind = "a URL with a password or a token" if "://" in value else "a token"
            raise ConfigError(
                f"{place}: {path} is {kind}, and run files are copied into run folders: leave it out, "
                "and use ~/.netrc or the environment."
            )


def _texts(values: Any, path: str = "", key: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _texts(value, f"{path}.{name}".strip("."), str(name))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _texts(value, f"{path}.{number}", key)
    elif isinstance(values, str) or (isinstance(values, int | float) and not isinstance(values, bool)):
        yield path, key, str(values)
