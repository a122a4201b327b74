"""The verifiers that are built in, each with the columns and parameters that it takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from falign.errors import ConfigError
from falign.rewards.verifier import Verifier

__all__ = ["choice", "mathematics", "number", "regex", "sections", "sql"]

MODULES = "falign.rewards.verifiers"
SQL_SHARE = 0.8  # of the deadline, after which the database gives up by itself and its process is kept


def mathematics(
    *, answer: str = "answer", decimals: int = 6, timeout: float = 10.0, failed: float | None = 0.0
) -> Verifier:
    """Return the check of a completion's last answer as an expression, by math-verify.

    Args:
        answer: The column with LaTeX, an expression, a number, or a text whose answer follows ``####``.
        decimals: Digits after the point to which numbers must agree.
        timeout: See :class:`Verifier`.
        failed: See :class:`Verifier`.
    """
    return Verifier(
        "math",
        f"{MODULES}.mathematics:score",
        columns={"answer": answer},
        parameters={"decimals": decimals},
        timeout=timeout,
        failed=failed,
    )


def number(
    *, answer: str = "answer", tolerance: float = 1e-6, timeout: float = 10.0, failed: float | None = 0.0
) -> Verifier:
    """Return the check of a completion's last number.

    Args:
        answer: The column with a number, or a text whose last number it is, or the first after ``####``.
        tolerance: Largest difference as a share of the answer.
        timeout: See :class:`Verifier`.
        failed: See :class:`Verifier`.
    """
    return Verifier(
        "number",
        f"{MODULES}.numbers:score",
        columns={"answer": answer},
        parameters={"tolerance": tolerance},
        timeout=timeout,
        failed=failed,
    )


def choice(
    *,
    answer: str = "answer",
    letters: str = "ABCDE",
    options: str | None = None,
    timeout: float = 10.0,
    failed: float | None = 0.0,
) -> Verifier:
    """Return the check of the letter that a completion settles on.

    Args:
        answer: The column with the letter.
        letters: Those that may be chosen.
        options: A column with the options' texts, which a completion may end with instead.
        timeout: See :class:`Verifier`.
        failed: See :class:`Verifier`.
    """
    return Verifier(
        "choice",
        f"{MODULES}.choice:{'score' if options is None else 'score_with_options'}",
        columns={"answer": answer} if options is None else {"answer": answer, "options": options},
        parameters={"letters": letters},
        timeout=timeout,
        failed=failed,
    )


def regex(
    pattern: str,
    *,
    whole: bool = False,
    answer: str | None = None,
    timeout: float = 10.0,
    failed: float | None = 0.0,
) -> Verifier:
    """Return the check whether a regular expression occurs.

    Args:
        pattern: Python's syntax; flags go inside (``(?s)``).
        whole: Whether it must match the whole completion.
        answer: A column that its first group must equal, in its last match.
        timeout: See :class:`Verifier`.
        failed: See :class:`Verifier`.

    Raises:
        ConfigError: The pattern is invalid, or has no group for ``answer``.
    """
    try:
        groups = re.compile(pattern).groups
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"reward regex: the pattern {pattern!r:.80} is invalid: {error}.") from error
    if answer is not None and groups == 0:
        raise ConfigError(
            f"reward regex: the pattern {pattern!r:.80} has no group that could equal answer={answer!r}; put "
            "parentheses around what is to be compared."
        )
    return Verifier(
        "regex",
        f"{MODULES}.patterns:{'matches' if answer is None else 'matches_answer'}",
        columns={} if answer is None else {"answer": answer},
        parameters={"pattern": pattern, "whole": whole},
        timeout=timeout,
        failed=failed,
    )


def sections(tags: Sequence[str], *, timeout: float = 10.0, failed: float | None = 0.0) -> Verifier:
    """Return the check whether a completion is a row of sections ``<tag>…</tag>`` and nothing else.

    Args:
        tags: Their names, in order.
        timeout: See :class:`Verifier`.
        failed: See :class:`Verifier`.
    """
    return Verifier(
        "sections",
        f"{MODULES}.patterns:sections",
        parameters={"tags": list(tags)},
        timeout=timeout,
        failed=failed,
    )


def sql(
    root: str | Path,
    *,
    database: str = "{db_id}.sqlite",
    answer: str = "query",
    max_rows: int = 10_000,
    skip_empty: bool = False,
    timeout: float = 10.0,
    failed: float | None = 0.0,
) -> Verifier:
    """Return the check whether a completion's query returns what the row's does, on a read-only SQLite file.

    Args:
        root: The folder of the databases; no file outside it is opened.
        database: The file in it, made of columns in braces.
        answer: The column with the row's query.
        max_rows: Most rows that it may return.
        skip_empty: Whether rows whose query returns nothing do not apply.
        timeout: See :class:`Verifier`; for both queries together.
        failed: See :class:`Verifier`.
    """
    parameters: dict[str, Any] = {
        "root": str(root),
        "seconds": SQL_SHARE * timeout,
        "max_rows": max_rows,
        "skip_empty": skip_empty,
    }
    return Verifier(
        "sql",
        f"{MODULES}.sql:score",
        columns={"answer": answer},
        templates={"database": database},
        parameters=parameters,
        timeout=timeout,
        failed=failed,
    )
