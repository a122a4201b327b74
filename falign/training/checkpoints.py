"""Which checkpoints are whole: each is sealed with checksums, and a run goes on from the newest whose seal holds.

``checksums.json`` names every file of a checkpoint with its size and SHA-256. It is written last, and the folder gets
its name after it, so that neither a kill nor a bad disk leaves anything that is taken for a whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from falign.durable import sync_file, sync_folder
from falign.errors import TrainingError

__all__ = [
    "checkpoints",
    "newest_whole",
    "remove_leftovers",
    "rotate",
    "seal",
    "step_of",
    "sync_logs",
    "why_damaged",
]

SEAL = "checksums.json"
DAMAGED = "damaged-"


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, the oldest first; a link is none, wherever it leads."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def seal(folder: Path) -> None:
    """Write down what all files of a checkpoint hold, as the last thing before it gets its name."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / SEAL]
    sums = {str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _checksum(file)} for file in files}
    (folder / SEAL).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def why_damaged(folder: Path, *, contents: bool = True) -> str | None:
    """Return what is wrong with a checkpoint; None where it is as it was sealed.

    Args:
        folder: The checkpoint.
        contents: Whether all files are read, or only their sizes compared.
    """
    try:
        sums = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{SEAL} is missing or cannot be read"
    for name, written in sums.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != written["bytes"]:
            return f"{name} has {file.stat().st_size:,} of {written['bytes']:,} bytes"
        if contents and _checksum(file) != written["sha256"]:
            return f"{name} has other content than was written"
    return None


def newest_whole(run: Path, *, tell: Callable[[str], None]) -> Path | None:
    """Return the newest whole checkpoint; damaged ones that are newer are put aside, and it is said so.

    They are renamed and not removed: ``damaged-checkpoint-6`` is never resumed from, counted or deleted.

    Args:
        run: The run folder.
        tell: Is told of each damaged one.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        TrainingError: There are checkpoints, and none is whole; all stay where they are.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints(run)):
        reason = why_damaged(checkpoint)
        if reason is None:
            for path, why in damaged.items():
                aside = _put_aside(path)
                tell(f"{path} is damaged ({why}): it is now {aside.name}, and the run goes on from {checkpoint.name}.")
            return checkpoint
        damaged[checkpoint] = reason
    if damaged:
        listed = "; ".join(f"{path.name}: {why}" for path, why in damaged.items())
        raise TrainingError(
            f"{run} has no whole checkpoint ({listed}): restore one, or start the run anew in another folder."
        )
    return None


def rotate(run: Path, *, keep: int | None) -> None:
    """Remove the oldest checkpoints beyond a number, and never the newest whole one: a resume would need it.

    Args:
        run: The run folder.
        keep: How many stay, at least 1; None keeps all.
    """
    if keep is None:
        return
    there = checkpoints(run)
    removable, kept = there[:-keep], there[-keep:]
    if all(why_damaged(checkpoint, contents=False) for checkpoint in reversed(kept)):
        return
    for checkpoint in removable:
        # Under another name first: a kill within the removal leaves nothing that looks like a checkpoint.
        leaving = checkpoint.with_name(f".{checkpoint.name}.removed")
        checkpoint.rename(leaving)
        shutil.rmtree(leaving)


def remove_leftovers(run: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    for path in run.glob(".*"):
        if path.suffix not in {".partial", ".replaced", ".removed"}:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync_logs(run: Path) -> None:
    """Return once what a run has logged is on the disk: a checkpoint must not be newer than the logs before it."""
    for name in ("metrics.jsonl", "completions.jsonl"):
        if (run / name).is_file():
            sync_file(run / name)


def _put_aside(checkpoint: Path) -> Path:
    aside, number = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}"), 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}-{number}")
    checkpoint.rename(aside)
    sync_folder(checkpoint.parent)
    return aside


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
