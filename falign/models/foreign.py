"""Reading what other libraries read: a malformed file makes each of them fail in its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from falign.errors import FalignError
from falign.full_disk import is_full_disk

__all__ = ["reading"]


@contextmanager
def reading(explain: Callable[[Exception], FalignError]) -> Iterator[None]:
    """Raise what ``explain`` makes of an error, whatever its type; the original is its cause.

    Pickle, safetensors, tokenizers, PEFT and transformers raise nearly every type there is on a damaged file. What is
    not the file's fault goes through: no memory, a full disk, and what falign says itself. A panic of code in Rust is
    not an ``Exception`` in Python, and is reported by its name.
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
