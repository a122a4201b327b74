"""Output of other libraries: silenced where falign reports the same, else without secrets and control characters."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

from tqdm import tqdm

from falign.errors import without_secrets
from falign.terminal import harmless

__all__ = ["clean", "cleaned_output", "quiet"]


def clean(text: str) -> str:
    """Return a text without secrets and terminal control characters."""
    return harmless(without_secrets(text))


@contextmanager
def cleaned_output() -> Iterator[None]:
    """Clean log records, warnings, and tracebacks from threads and finalizers while the block runs."""
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning
    in_thread, in_finalizer = threading.excepthook, sys.unraisablehook

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        return _clean_record(make_record(*args, **options))

    def warning(*args: Any, **options: Any) -> str:
        return clean(format_warning(*args, **options))

    def exception(failure: Any) -> None:
        lines = traceback.format_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
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
    except (TypeError, ValueError):  # the caller's arguments do not fit its format
        text = f"{record.msg} {record.args}"
    record.msg, record.args = clean(text), ()
    if record.exc_info and record.exc_info[0]:
        record.exc_text = clean(logging.Formatter().formatException(record.exc_info))
    return record


def quiet() -> None:
    """Silence notices and progress bars of other libraries; call this before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own bars follow it too
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers shows a bar when it converts GGUF files, whatever its settings. TQDM_DISABLE would come too late:
    # tqdm reads it at import, which torch has done by now.
    bar: Any = tqdm
    bar.__init__ = partialmethod(bar.__init__, disable=True)
    # At import it reports that an optional package of kernels is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
