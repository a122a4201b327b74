"""SQL: compare the results of a completion's query and of the row's query on a read-only SQLite file."""

import re
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import Any

from . import RowError

__all__ = ["extract_query", "score"]

ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
REFUSED_FUNCTIONS = {"load_extension", "writefile", "readfile", "edit"}
INSTRUCTIONS_PER_CHECK = 10_000
LARGEST_VALUE = 10_000_000  # bytes
FENCE = re.compile(r"```[ \t]*(?:sql|sqlite)?[ \t]*\n(.*?)```", re.IGNORECASE | re.DOTALL)

Row = tuple[Any, ...]


def score(
    completion: str,
    answer: Any,
    *,
    database: str,
    root: str,
    seconds: float,
    max_rows: int,
    skip_empty: bool,
) -> float | None:
    """Return 1 if both queries return the same rows, else 0; None if the row's returns nothing and is skipped.

    Rows are compared as a multiset, or in order if the row's query has ORDER BY; columns always in order; numbers to
    10 digits.

    Args:
        completion: A query, alone or in its last fenced block; one statement.
        answer: The row's query.
        database: The file, relative to ``root``.
        root: The folder that holds all of them.
        seconds: Time for both queries.
        max_rows: See :func:`falign.rewards.sql`.
        skip_empty: See :func:`falign.rewards.sql`.

    Raises:
        RowError: The file is not a database below ``root``, or the row's query is missing or fails there.
        TimeoutError: The time was not enough.
    """
    deadline = time.monotonic() + seconds
    answer = _query_of_row(answer)
    connection = _open(Path(root), database)
    try:
        connection.set_progress_handler(lambda: time.monotonic() > deadline, INSTRUCTIONS_PER_CHECK)
        try:
            expected = _rows(connection, extract_query(answer), max_rows + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            _check_time(deadline, seconds)
            raise RowError(f"the query of the row fails on {database}: {error}") from error
        if len(expected) > max_rows:
            raise RowError(f"the query of the row returns more than max_rows={max_rows} rows")
        if skip_empty and not expected:
            return None
        try:
            found = _rows(connection, extract_query(completion), len(expected) + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError):
            _check_time(deadline, seconds)
            return 0.0
        ordered = re.search(r"\border\s+by\b", answer, re.IGNORECASE) is not None
        return float(found == expected if ordered else Counter(found) == Counter(expected))
    finally:
        connection.close()


def extract_query(text: str) -> str:
    """Return the last fenced block; without one, the text from the first line that begins with SELECT or WITH."""
    blocks = FENCE.findall(text)
    if blocks:
        return blocks[-1].strip()
    begin = re.search(r"^\s*(?:select|with)\b", text, re.IGNORECASE | re.MULTILINE)
    return text[begin.start() :].strip() if begin else text.strip()


def _query_of_row(answer: Any) -> str:
    if not isinstance(answer, str) or not answer.strip():
        raise RowError(f"the query of the row is {answer!r:.80}; it must be a text")
    return answer


def _open(root: Path, database: str) -> sqlite3.Connection:
    folder = root.resolve()
    try:
        file = (folder / database).resolve()
        if not file.is_relative_to(folder):
            raise RowError(f"the database {database!r} is not inside {root}")
        if not file.is_file():
            raise RowError(f"there is no database {database!r} in {root}")
        connection = sqlite3.connect(f"{file.as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)
        connection.execute("PRAGMA schema_version")  # the first to read the file
    except (OSError, ValueError, sqlite3.Error) as error:  # damaged, or no path at all
        raise RowError(f"the database {database!r:.80} cannot be opened: {error}") from error
    connection.text_factory = lambda raw: raw.decode("utf-8", errors="replace")
    connection.execute("PRAGMA temp_store=MEMORY")  # a large sort would go to a file, which may not be written
    connection.set_authorizer(_authorize)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST_VALUE)
    return connection


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION:
        return sqlite3.SQLITE_DENY if second in REFUSED_FUNCTIONS else sqlite3.SQLITE_OK
    return sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY


def _rows(connection: sqlite3.Connection, query: str, most: int) -> list[Row]:
    cursor = connection.execute(query)
    return [tuple(_rounded(value) for value in row) for row in cursor.fetchmany(most)]


def _rounded(value: Any) -> Any:
    # Sums of the same numbers in another order differ in their last digits.
    return float(f"{value:.10g}") if isinstance(value, float) else value


def _check_time(deadline: float, seconds: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"the queries took more than {seconds:g} s")
