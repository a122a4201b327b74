"""Checkpoints with a seal of checksums; a run resumes from the newest checkpoint that matches its seal.

``checksums.json`` names the run and the step, every file of the checkpoint with its size and SHA-256, and the state of
the run's logs. It is written last, and only then does the folder get its final name. So a kill, a bad disk or an
incomplete copy cannot leave a checkpoint that looks complete but is not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, ValidationError

from falign.durable import checksum, sync_file, sync_folder
from falign.errors import TrainingError
from falign.runfile.base_config import FrozenModel

__all__ = [
    "LogMark",
    "checkpoints",
    "holds",
    "log_marks",
    "newest_undamaged",
    "remove_leftovers",
    "rotate",
    "seal",
    "step_of",
    "sync_logs",
    "weight_sums",
    "why_damaged",
]

SEAL = "checksums.json"
DAMAGED = "damaged-"
WEIGHTS = frozenset({".safetensors", ".bin"})
LOGS = ("metrics.jsonl", "completions.jsonl")


class LogMark(NamedTuple):
    """The state of a log: its size, and the SHA-256 of its bytes."""

    bytes: int
    sha256: str


class _Sum(FrozenModel):
    bytes: int
    sha256: str


class _Seal(FrozenModel):
    run: str
    step: int
    logs: dict[str, _Sum]
    files: dict[str, _Sum] = Field(min_length=1)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, without links."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def seal(folder: Path, *, run: str, step: int, logs: Mapping[str, LogMark]) -> None:
    """Write the checksums of a checkpoint's files; afterwards it only needs its final name.

    Args:
        folder: The checkpoint.
        run: The identifier of its run.
        step: The number of optimizer steps taken.
        logs: The state of each log of the run; see :func:`sync_logs`.
    """
    files = {name: {"bytes": file.stat().st_size, "sha256": checksum(file)} for name, file in _files(folder).items()}
    sealed = {"run": run, "step": step, "logs": {name: mark._asdict() for name, mark in logs.items()}, "files": files}
    (folder / SEAL).write_text(json.dumps(sealed, indent=1), encoding="utf-8")


def why_damaged(
    folder: Path, *, run: str | None = None, contents: bool = True, unread: Collection[str] = ()
) -> str | None:
    """Return why a checkpoint counts as damaged; None if it matches its seal.

    Args:
        folder: The checkpoint.
        run: The identifier of the run that it must belong to; None accepts any run.
        contents: Compare the contents of all files, not only their sizes.
        unread: Files of which only the size is compared, even with ``contents``.
    """
    try:
        sealed = _Seal.model_validate_json((folder / SEAL).read_bytes())
    except (OSError, ValidationError):
        return f"{SEAL} is missing or damaged"
    if run is not None and sealed.run != run:
        return "it belongs to another run"
    if sealed.step != step_of(folder):
        return f"it is the checkpoint of step {sealed.step}"
    return _first_damaged(folder, sealed.files, unread=unread if contents else sealed.files)


def _first_damaged(folder: Path, files: Mapping[str, _Sum], *, unread: Collection[str]) -> str | None:
    there = _files(folder)
    if unlisted := sorted(there.keys() - files.keys()):
        return f"{unlisted[0]} is not in {SEAL}"
    for name, written in files.items():
        if name not in there:
            return f"{name} is missing"
        size = there[name].stat().st_size
        if size != written.bytes:
            return f"{name} has {size:,} of {written.bytes:,} bytes"
        if name not in unread and checksum(there[name]) != written.sha256:
            return f"{name} has changed since it was written"
    return None


def weight_sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight file in a folder."""
    return {name: checksum(file) for name, file in _files(folder).items() if file.suffix in WEIGHTS}


def log_marks(checkpoint: Path) -> dict[str, LogMark]:
    """Return the state of each log of the run when an undamaged checkpoint was written."""
    sealed = _Seal.model_validate_json((checkpoint / SEAL).read_bytes())
    return {name: LogMark(mark.bytes, mark.sha256) for name, mark in sealed.logs.items()}


def newest_undamaged(folder: Path, *, run: str | None = None, tell: Callable[[str], None]) -> Path | None:
    """Return the newest undamaged checkpoint; newer, damaged ones are renamed and reported.

    They are kept: ``damaged-checkpoint-6`` is never resumed from, counted or deleted.

    Args:
        folder: The run folder.
        run: The identifier of the run; a checkpoint of another run counts as damaged. None accepts any run.
        tell: Called with a message for each damaged one.

    Returns:
        None if there is no checkpoint.

    Raises:
        TrainingError: All checkpoints are damaged; none is renamed.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints(folder)):
        reason = why_damaged(checkpoint, run=run)
        if reason is None:
            for path, why in damaged.items():
                aside = _put_aside(path)
                tell(f"{path} is damaged ({why}): it is now {aside.name}, and the run resumes from {checkpoint.name}.")
            return checkpoint
        damaged[checkpoint] = reason
    if damaged:
        listed = "; ".join(f"{path.name}: {why}" for path, why in damaged.items())
        raise TrainingError(
            f"{folder} has no undamaged checkpoint ({listed}): restore one, or start the run again in another folder."
        )
    return None


def rotate(folder: Path, *, run: str, keep: int | None, best: int | None = None) -> None:
    """Remove the oldest checkpoints beyond a number, but never the newest undamaged one, which a resume would need.

    Args:
        folder: The run folder.
        run: The identifier of the run.
        keep: Number of checkpoints to keep, at least 1; None keeps all.
        best: The step of a checkpoint to keep besides these.
    """
    if keep is None:
        return
    there = checkpoints(folder)
    removable, kept = [each for each in there[:-keep] if step_of(each) != best], there[-keep:]
    # If all of the newest ones are damaged, the newest undamaged one may be among those to remove.
    if all(why_damaged(checkpoint, run=run, contents=False) for checkpoint in reversed(kept)):
        return
    for checkpoint in removable:
        # Renamed first: a kill during the removal then leaves nothing that looks like a checkpoint.
        leaving = checkpoint.with_name(f".{checkpoint.name}.removed")
        checkpoint.rename(leaving)
        shutil.rmtree(leaving)


def remove_leftovers(folder: Path) -> None:
    """Remove files and folders that a killed process left half written or half removed."""
    for path in folder.glob(".*"):
        if path.suffix not in {".partial", ".replaced", ".removed"}:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync_logs(folder: Path) -> dict[str, LogMark]:
    """Flush the logs of a run to the disk and return their state.

    A checkpoint must not reach the disk before the logs of its steps, which a resume would truncate to the marks.
    """
    marks = {}
    for name in LOGS:
        file = folder / name
        if file.is_file():
            sync_file(file)
            marks[name] = LogMark(file.stat().st_size, checksum(file))
    return marks


def holds(file: Path, mark: LogMark) -> bool:
    """Return whether a log is unchanged up to a mark."""
    if not file.is_file() or file.stat().st_size < mark.bytes:
        return False
    return checksum(file, mark.bytes) == mark.sha256


def _put_aside(checkpoint: Path) -> Path:
    aside, number = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}"), 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}-{number}")
    checkpoint.rename(aside)
    sync_folder(checkpoint.parent)
    return aside


def _files(folder: Path) -> dict[str, Path]:
    """Return all files below a folder except the seal, by their relative names."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / SEAL]
    return {str(file.relative_to(folder)): file for file in files}
