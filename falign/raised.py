"""Messages for exceptions in a user's own code: the part, the lines that raised, and the completion being scored."""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from falign.durable import is_full_disk
from falign.errors import FalignError, MemberError, without_secrets

__all__ = ["CodeLine", "calling", "code_lines", "completion_at_fault", "own_lines", "raised_message"]

MOST_LINES = 3
LONGEST_COMPLETION = 300
_FALIGN = Path(__file__).parent
_INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class CodeLine(NamedTuple):
    """A line of a traceback.

    Attributes:
        file: Path of the source.
        number: Line number.
        function: Name of the function.
        source: The line itself; ``""`` if the source is missing.
    """

    file: str
    number: int
    function: str
    source: str


def code_lines(error: BaseException) -> list[CodeLine]:
    """Return the lines of an exception's traceback; the line that raised comes last."""
    frames = traceback.extract_tb(error.__traceback__)
    return [CodeLine(each.filename, each.lineno or 0, each.name, each.line or "") for each in frames]


def own_lines(lines: Sequence[CodeLine]) -> list[CodeLine]:
    """Return the lines that belong to the user's files."""
    return [line for line in lines if _is_own(line)]


def completion_at_fault(error: BaseException, completions: Sequence[Any]) -> int | None:
    """Return the completion that was being scored: the one held by a variable of the innermost frame.

    Args:
        error: Raised by a reward.
        completions: The objects that it was given, not copies.
    """
    if len(completions) == 1:
        return 0
    known = {id(completion): i for i, completion in enumerate(completions)}
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        held = {known[id(value)] for value in frame.f_locals.values() if id(value) in known}
        if len(held) == 1:
            return held.pop()
    return None


def raised_message(text: str, lines: Sequence[CodeLine], completion: str | None) -> str:
    """Return an exception's message for the user, without secrets and control characters.

    Args:
        text: Class and message.
        lines: Lines of its traceback; only the user's files and the line that raised are kept.
        completion: The completion that was being scored, if known.
    """
    own = own_lines(lines)
    kept = [*own[-MOST_LINES:], *[line for line in lines[-1:] if not _is_own(line)]]
    parts = [
        text,
        *(f'  File "{line.file}", line {line.number}, in {line.function}\n    {line.source}' for line in kept),
    ]
    if completion is not None:
        cut = "" if len(completion) <= LONGEST_COMPLETION else f" (the first {LONGEST_COMPLETION} characters)"
        parts.append(f"  completion{cut}: {completion[:LONGEST_COMPLETION]!r}")
    return without_secrets("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in "\n".join(parts)))


@contextmanager
def calling(role: str, member: object) -> Iterator[None]:
    """Name a part of the user's own in the exceptions that it raises.

    Exceptions of falign's own parts, and those of a full disk, stay as they are.

    Args:
        role: The role of the part, for messages, such as ``token weight``.
        member: The object or function that is called.

    Raises:
        MemberError: The part, or code of the user's that it calls, raised an exception, which is the cause.

    Example:
        >>> with calling("token weight", print):  # doctest: +IGNORE_EXCEPTION_DETAIL
        ...     1 / 0
        Traceback (most recent call last):
        MemberError: token weight print: ZeroDivisionError: division by zero
    """
    try:
        yield
    except FalignError:
        raise  # already has its place
    except Exception as error:
        if is_full_disk(error):
            raise  # nothing to correct in the code
        lines, named = code_lines(error), member if inspect.isroutine(member) else type(member)
        # Called with wrong arguments, a part raises before its first line.
        if not own_lines(lines) and str(named.__module__).partition(".")[0] == __package__:
            raise
        raised = raised_message(f"{type(error).__name__}: {error}", lines, None)
        raise MemberError(f"{role} {named.__name__}: {raised}\nCorrect its code.") from error


def _is_own(line: CodeLine) -> bool:
    file = Path(line.file)
    if line.file.startswith("<"):  # the import system's frozen modules
        return False
    return not any(file.is_relative_to(folder) for folder in (_FALIGN, *_INSTALLED))
