"""Errors of other libraries on malformed files, converted to falign's errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from falign.durable import is_full_disk
from falign.errors import FalignError

__all__ = ["reading"]


@contextmanager
def reading(explain: Callable[[Exception], FalignError]) -> Iterator[None]:
    """Convert any error to the one that ``explain`` returns, with the original as its cause.

    Pickle, safetensors, tokenizers, PEFT and transformers raise almost every type of error on a damaged file. Errors
    that are not due to the file pass unchanged: out of memory, a full disk, and falign's own errors. A panic of Rust
    code is not an ``Exception`` in Python, and is recognized by its name.
    """
    try:
        yield
    except (FalignError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if is_full_disk(error):
            raise
        raise explain(error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise explain(RuntimeError(f"a panic, {error}")) from error
