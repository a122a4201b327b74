"""Shared options, and the translation of the library's messages to option names."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Collection
from functools import partial, wraps
from typing import Annotated, Any

import typer
from rich.text import Text
from typing_extensions import override

from falign.errors import FalignError
from falign.terminal import Terminal

__all__ = ["CommandTerminal", "TrustCode", "options_named", "with_options_named"]

TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="Run code that the run folder names: functions, divergences, the model's own code."
    ),
]
"""The option of every command that builds the members a run folder names."""

ALWAYS_KNOWN = ("base_name_or_path", "prompts", "reference", "resume", "temperature")
"""Arguments that messages name even under a command without the option."""

SPECIAL_NAMES = {
    "benchmark": "BENCHMARK",
    "loss": "LOSS",
    "base_name_or_path": "--base",
    "anchors=False": "--no-anchors",
    "chat=False": "--plain",
    "num_resamples": "--resamples",
}
"""Options and positional arguments that are not called like the library's argument."""


def with_options_named(
    command: Callable[..., None] | None = None, *, names: Collection[str] | None = None
) -> Callable[..., Any]:
    """Decorate a command so that the library's errors name its options instead of the library's arguments.

    In a message, ``max_length=64`` becomes ``--max-length 64``, and `` `max_length` `` becomes ``--max-length``.

    Args:
        command: The command; its parameters are named like the library function's arguments.
        names: The arguments to translate; by default all of the command's and some common ones. A command that reads
            run files must restrict them to its own options, because fields of the run file have the same names.
    """
    if command is None:
        return partial(with_options_named, names=names)
    known = {*inspect.signature(command).parameters, *ALWAYS_KNOWN} if names is None else names

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except FalignError as error:
            error.args = tuple(options_named(each, known) if isinstance(each, str) else each for each in error.args)
            raise

    return run


def options_named(text: str, names: Collection[str]) -> str:
    """Return a message in which the library's arguments are written as a user types them in a shell.

    Example:
        >>> options_named("set columns={prompt: question} or ignore=[a, b]; raise `max_length`", {"columns", "ignore"})
        "set --columns '{prompt: question}' or --ignore a --ignore b; raise `max_length`"
    """
    any_name = "|".join(sorted(names, key=len, reverse=True))  # longest first: a regex takes the first that fits
    # Either `name`, or name=value where the name is not part of a longer word, a dotted field or an option.
    value = r"True\b|False\b|\{[^{}]*\}|\[[\w., -]+\]"
    return re.sub(rf"`({any_name})`|(?<![\w.\"'`-])({any_name})=({value})?", _option, text)


def _option(match: re.Match[str]) -> str:
    name, value = match[1] or match[2], match[3]
    flag = SPECIAL_NAMES.get(match[0], SPECIAL_NAMES.get(name, f"--{name.replace('_', '-')}"))
    if match[1] or value in {"True", "False"}:
        return flag
    if value is None:
        return f"{flag} "  # the value follows
    if value.startswith("{"):
        return f"{flag} {shlex.quote(value)}"
    return " ".join(f"{flag} {shlex.quote(each)}" for each in value[1:-1].split(", "))


CHAT = re.compile(r"\bchat=(True|False)\b")


class CommandTerminal(Terminal):
    """A console for the library's notices: writes ``chat=True`` as ``--chat`` and ``chat=False`` as ``--plain``."""

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(CHAT.sub(lambda match: SPECIAL_NAMES.get(match[0], "--chat"), text), **options)
