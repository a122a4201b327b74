"""Options that commands share, and messages of the library in the words of the command line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from functools import partial, wraps
from typing import Annotated, Any

import typer
from rich.text import Text
from typing_extensions import override

from falign.errors import FalignError
from falign.terminal import Terminal

__all__ = ["CommandTerminal", "TrustCode", "with_options_named"]

TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="Run code that the run folder names: functions, divergences, its model's own code."
    ),
]
"""The option of every command that builds what a run folder names."""

OF_OTHERS = ("reference", "temperature", "prompts")
"""Options of other commands, which messages name as well."""

OTHER_NAMES = {"chat=False": "--plain", "num_resamples": "--resamples"}


def with_options_named(
    command: Callable[..., None] | None = None, *, names: Collection[str] | None = None
) -> Callable[..., Any]:
    """Let errors of the library name the command's options.

    ``max_length=64`` becomes ``--max-length 64``, and a name in backquotes, `` `max_length` ``, ``--max-length``.

    Args:
        command: Its parameters have the names of the library function's arguments.
        names: Options to name; by default all of the command's and the usual ones of other commands. A command that
            reads run files names its own alone, since their fields have such names, too.
    """
    if command is None:
        return partial(with_options_named, names=names)
    known = {*inspect.signature(command).parameters, *OF_OTHERS} if names is None else names
    any_name = "|".join(sorted(known, key=len, reverse=True))
    argument = re.compile(rf"`({any_name})`|(?<![\w.\"'`-])({any_name})=(True\b|False\b)?")

    def option(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        told = OTHER_NAMES.get(match[0], OTHER_NAMES.get(name, f"--{name.replace('_', '-')}"))
        return told if match[1] or match[3] else f"{told} "

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except FalignError as error:
            error.args = tuple(argument.sub(option, each) if isinstance(each, str) else each for each in error.args)
            raise

    return run


CHAT = re.compile(r"\bchat=(True|False)\b")


class CommandTerminal(Terminal):
    """A console for notices of the library, in which ``chat=True`` is ``--chat`` and ``chat=False`` is ``--plain``."""

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(CHAT.sub(lambda match: OTHER_NAMES.get(match[0], "--chat"), text), **options)
