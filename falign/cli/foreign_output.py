"""Text that libraries print by themselves (logs, warnings, tracebacks): without secrets, harmless to a terminal."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from falign.terminal import harmless, without_secrets

__all__ = ["clean", "cleaned_output"]


def clean(text: str) -> str:
    """Return a text without secrets, in which no character commands a terminal."""
    return harmless(without_secrets(text))


@contextmanager
def cleaned_output() -> Iterator[None]:
    """Clean the log records, the warnings, and the exceptions of threads and finalizers while the block runs."""
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning
    in_thread, in_finalizer = threading.excepthook, sys.unraisablehook

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        return _clean_record(make_record(*args, **options))

    def warning(*args: Any, **options: Any) -> str:
        return clean(format_warning(*args, **options))

    def exception(found: Any) -> None:
        lines = traceback.format_exception(found.exc_type, found.exc_value, found.exc_traceback)
        print(clean("".join(lines)), end="", file=sys.stderr)

    logging.setLogRecordFactory(record)
    warnings.formatwarning = warning
    threading.excepthook = sys.unraisablehook = exception
    try:
        yield
    finally:
        logging.setLogRecordFactory(make_record)
        warnings.formatwarning = format_warning
        threading.excepthook, sys.unraisablehook = in_thread, in_finalizer


def _clean_record(record: logging.LogRecord) -> logging.LogRecord:
    try:
        text = record.getMessage()
    except (TypeError, ValueError):  # arguments that do not fit the format, which are the caller's mistake
        text = f"{record.msg} {record.args}"
    record.msg, record.args = clean(text), ()
    if record.exc_info and record.exc_info[0]:
        record.exc_text = clean(logging.Formatter().formatException(record.exc_info))
    return record
