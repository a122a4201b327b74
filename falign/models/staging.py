"""Folders and files of models: written completely or not at all, and read with errors that name the file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from falign.durable import is_full_disk, staged
from falign.errors import ConfigError, FalignError, ModelError

__all__ = ["reading", "refuse_other_folder", "save_tensors", "staged_folder"]


MODEL_MARKS = ("config.json", "adapter_config.json", "*.gguf")
"""Files that show that a folder holds a model or an adapter."""

RUN_PART = re.compile(r"(?:adapter|model|references?|checkpoint-\d+)$")
"""Folders with models that a run keeps, beside its ``manifest.json``."""


@contextmanager
def staged_folder(
    target: Path,
    *,
    existing: Literal["refuse", "replace", "keep"] = "refuse",
    needed_bytes: int | None = None,
) -> Iterator[Path]:
    """Yield a temporary sibling of ``target`` that takes its name when the block ends without an error.

    Before that, all files are synced to disk, so the folder is complete even after a power cut.

    Args:
        target: The final folder; its parents are made.
        existing: What to do if ``target`` is not empty: ``refuse`` raises, ``replace`` replaces it, ``keep`` drops
            the new folder, because another process has written the same content.
        needed_bytes: The expected size, for the message when the disk is full.

    Raises:
        ModelError: ``target`` is occupied and ``existing="refuse"``, or the disk is full.
    """
    _refuse_occupied(target, existing)
    target.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(target.parent).free
    try:
        with staged(target, "folder", keep=existing == "keep") as staging:
            yield staging
            _make_readable(staging)
            _refuse_occupied(target, existing)
    except Exception as error:
        if not is_full_disk(error, folder=target.parent):
            raise
        needed = "" if needed_bytes is None else f", about {_megabytes(needed_bytes)} needed"
        raise ModelError(
            f"{target}: the disk is full ({_megabytes(free_bytes)} free before writing{needed}). Nothing was written "
            "there; free some space, or choose a folder on another disk."
        ) from error


def refuse_other_folder(target: Path, *, what: str, sources: Iterable[str | Path] = ()) -> None:
    """Keep overwriting from replacing a run, a home folder, or anything else that is not a model.

    Args:
        target: The folder that is to be written.
        what: Noun for messages.
        sources: Models that it is made from or compared with.

    Raises:
        ConfigError: The folder holds other files, or one of the sources.
    """
    for source in map(Path, sources):
        if source.exists() and source.resolve().is_relative_to(target.resolve()):
            raise ConfigError(f"out={target} would replace {source}, which {what} is made from: choose another folder.")
    place = target.resolve()
    if (target / "manifest.json").is_file():  # a run shows the files of its model
        raise ConfigError(f"out={target} is a run: choose another folder.")
    for folder in place.parents if place.is_dir() else ():
        if (folder / "manifest.json").is_file() and RUN_PART.match(place.relative_to(folder).parts[0]):
            raise ConfigError(f"out={target} is a part of the run {folder}: choose another folder.")
    if target.is_dir() and any(target.iterdir()) and not any(any(target.glob(mark)) for mark in MODEL_MARKS):
        raise ConfigError(f"out={target} holds something other than {what}: choose another folder.")


def _refuse_occupied(target: Path, existing: str) -> None:
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target} is a file, but a folder must be written there: choose another name.")
    if existing == "refuse" and _occupied(target):
        raise ModelError(f"{target} exists and is not empty: choose another folder, or give `overwrite` to replace it.")


def _make_readable(folder: Path) -> None:
    # safetensors makes its files readable only by their owner. They get the permissions of the folder, from the umask.
    mode = folder.stat().st_mode & 0o666
    for file in folder.iterdir():
        file.chmod(mode)


def _occupied(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write tensors, and metadata with sorted keys.

    The library writes metadata in random order, so two files with the same contents could differ.

    Args:
        tensors: By name; contiguous, and on any device.
        path: The file to write.
        metadata: Text by key.
    """
    save_file(dict(tensors), path, metadata=dict(metadata))
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(metadata.items()))
        # The length of the header must stay, because the tensors follow it; the format allows spaces at its end.
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


@contextmanager
def reading(explain: Callable[[Exception], FalignError]) -> Iterator[None]:
    """Convert any error to the one that ``explain`` returns, with the original as its cause.

    On a damaged file, pickle, safetensors, tokenizers, PEFT and transformers raise almost every type of error. Errors
    that are not due to the file pass unchanged: out of memory, a full disk, and falign's own errors. A panic in Rust
    code is no ``Exception`` in Python; it is recognized by its name.
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
