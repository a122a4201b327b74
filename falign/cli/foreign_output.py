"""Output of libraries: silenced where falign says it itself, else without secrets and harmless to a terminal."""

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


def quiet() -> None:
    """Silence notices and progress bars of the libraries; call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own bars follow it too
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The conversion of GGUF files asks for a bar by itself. tqdm reads its own variable, TQDM_DISABLE, when it is
    # imported, which torch has done by now.
    bar: Any = tqdm
    bar.__init__ = partialmethod(bar.__init__, disable=True)
    # Reports kernels of a package that is optional, at import and once per process.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
