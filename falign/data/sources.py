"""Sources of rows: a file, a folder, a dataset on the Hub, or a sample inside the package."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from falign.choices import nearest
from falign.data.files import FILE_SUFFIXES, Row, read_file
from falign.data.memory import PYTHON, InMemory
from falign.data.reports import BadRows
from falign.errors import ConfigError, DataError

__all__ = ["DEMOS", "DataSource", "check_split", "place_in_source", "read_rows", "require_source", "rows_of"]

DEMOS: dict[str, Path] = {
    "demo:polite-preference": Path(__file__).parent / "embedded" / "polite-preference.jsonl.gz",
    "demo:one-digit-arithmetic": Path(__file__).parent / "embedded" / "one-digit-arithmetic",
}
"""Datasets inside the package, by the path that names them: a file, or a folder with a file per split."""

_SHARD = re.compile(r"[-_.]\d+(-of-\d+)?(-[0-9a-f]{16})?$")  # suffix of one file of a table in several files

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class DataSource:
    """One source of preference data.

    Attributes:
        path: A file, a folder, a Hub dataset (``"org/name"``), or a sample inside the package:
            ``"demo:polite-preference"`` (pairs) or ``"demo:one-digit-arithmetic"`` (questions with answers).
        split: The split of a Hub dataset or of a folder with several; the arithmetic has ``train`` and ``test``.
        format: A name of ``falign.data.FORMATS``, or ``"auto"`` to infer it from the columns.
        columns: The file's column names by falign's, for example ``{"prompt": "question"}``; ``"outer.inner"`` is an
            entry of a column of objects.
        chat: Whether plain texts are turns, the prompt a user's, to be rendered by the chat template. With None plain
            texts are refused if the tokenizer has a chat template.
        ignore: Columns, and keys of turns, that look like a part of the prompt but are not.
        weight: Share of this source in a mixture; either all sources have a weight or none.
        limit: Keep at most this many examples, the first usable ones.
        rows: The rows themselves; ``path`` is then only their name.
    """

    path: str
    split: str = "train"
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    chat: bool | None = None
    ignore: tuple[str, ...] = ()
    weight: float | None = None
    limit: int | None = None
    rows: InMemory | None = None

    def with_chat(self, chat: bool | None) -> DataSource:
        """Return the same source, with its plain texts read in another way."""
        return replace(self, chat=chat)

    def __post_init__(self) -> None:
        if self.weight is not None and not (0 < self.weight < math.inf):
            raise ConfigError(f"{self.path}: weight={self.weight} must be a positive number.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"{self.path}: limit={self.limit} must be at least 1; leave it out to keep all.")


def read_rows(path: str | Path, *, split: str = "train", bad_rows: BadRows | None = None) -> Iterator[Row]:
    """Yield the rows of a source in its order.

    Args:
        path: As ``DataSource.path``.
        split: As ``DataSource.split``; a single file has no splits.
        bad_rows: Receives lines that are not rows; by default the first one raises.

    Raises:
        DataError: The source does not exist or cannot be read.
    """
    bad_rows = bad_rows or BadRows()
    require_source(path)
    name, local = str(path), Path(path)
    if name.startswith("demo:"):
        if DEMOS[name].is_dir():
            yield from _read_folder(DEMOS[name], split, bad_rows, name=name)
        else:
            yield from read_file(DEMOS[name], bad_rows=bad_rows, name=name)
    elif local.is_file():
        yield from read_file(local, bad_rows=bad_rows)
    elif local.is_dir():
        yield from _read_folder(local, split, bad_rows)
    else:
        yield from _numbered(_load_from_hub(name, split), f"{name}[{split}]")


def require_source(path: str | Path) -> None:
    """Refuse a source that is known to be missing before anything is read.

    Args:
        path: As ``DataSource.path``.

    Raises:
        DataError: The source is missing; the message suggests the nearest name.
    """
    name, local = str(path), Path(path)
    if name.startswith(PYTHON):
        raise DataError(
            f"{name} was an object in a program ({name.removeprefix(PYTHON)}), not a file: give the same rows again, "
            "or save them as a file and name it."
        )
    if name.startswith("demo:"):
        if name not in DEMOS:
            raise DataError(f"{name}: no such sample in the package; there is {', '.join(sorted(DEMOS))}.")
    elif not local.is_file() and not local.is_dir():
        on_hub = _HUB_NAME.fullmatch(name) and not name.endswith(FILE_SUFFIXES) and not local.parent.is_dir()
        if not on_hub:
            raise DataError(_not_found(local))


def rows_of(
    path: str | Path, rows: InMemory | None, *, split: str = "train", bad_rows: BadRows | None = None
) -> Iterator[Row]:
    """Yield the rows of a source: those in memory if there are any, otherwise those of its path.

    Args:
        path: As ``DataSource.path``.
        rows: As ``DataSource.rows``.
        split: As ``DataSource.split``.
        bad_rows: As for :func:`read_rows`.

    Raises:
        DataError: The source is missing, cannot be read, or has no such split.
    """
    if rows is not None:
        return rows.read(bad_rows=bad_rows)
    check_split(str(path), split)
    return read_rows(path, split=split, bad_rows=bad_rows)


def place_in_source(place: str, source: DataSource) -> str:
    """Return the place of a row without the path of its source, which may be written in many ways.

    Example:
        >>> place_in_source("data/a.jsonl:12", DataSource("./data/a.jsonl"))
        ':12'
    """
    if source.path.startswith(("demo:", PYTHON)):
        return place.removeprefix(source.path)
    return place.removeprefix(str(Path(source.path)))


def check_split(path: str, split: str) -> None:
    """Refuse a split of a single file, unless its name contains the split.

    Args:
        path: As ``DataSource.path``.
        split: As ``DataSource.split``; ``"train"`` is also the split of a source that names none.

    Raises:
        DataError: The file has no such split.
    """
    file = DEMOS.get(path, Path(path))
    named = re.search(rf"(?<![A-Za-z0-9]){re.escape(split)}(?![A-Za-z0-9])", file.name)
    if split != "train" and not named and file.is_file():
        raise DataError(
            f"{path}: split={split!r} cannot be chosen: this is one file, which has no splits; leave it out, "
            "or give the file of that split."
        )


def _not_found(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    guess = nearest(path.name, siblings)
    if guess:
        return f"{path}: no such file or folder; did you mean {path.parent / guess}?"
    if path.parent.is_dir():
        return f"{path}: no such file or folder, nor a Hub dataset (written org/name); check the path."
    return f"{path}: no such file or folder; {path.parent} does not exist either. Check the path."


def _read_folder(folder: Path, split: str, bad_rows: BadRows, *, name: str | None = None) -> Iterator[Row]:
    saved_dataset = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    if saved_dataset or (folder / "dataset_dict.json").is_file():
        yield from _numbered(_load_saved(folder, split), f"{folder}[{split}]" if not saved_dataset else str(folder))
        return
    files = sorted(entry for entry in folder.iterdir() if entry.name.lower().endswith(FILE_SUFFIXES))
    chosen = [file for file in files if re.match(rf"{re.escape(split)}(?![a-zA-Z0-9])", file.name)]
    if not chosen:
        found = ", ".join(file.name for file in files) or f"no file of the types {FILE_SUFFIXES}"
        raise DataError(
            f"{name or folder}: no data file is named after the split {split!r}; found {found}. "
            "Give the path of a file, or the split that a file's name begins with."
        )
    _check_one_split(chosen, split, name or str(folder))
    for file in chosen:
        yield from read_file(file, bad_rows=bad_rows, name=f"{name}[{split}]" if name else None)


def _check_one_split(files: Sequence[Path], split: str, name: str) -> None:
    """Refuse files that do not form one table: several splits, or one split in several file types."""
    suffixes = {file: next(s for s in FILE_SUFFIXES if file.name.lower().endswith(s)) for file in files}
    stems = {_SHARD.sub("", file.name[: -len(suffix)]) for file, suffix in suffixes.items()}
    choices = stems if len(stems) > 1 else {file.name for file in files} if len(set(suffixes.values())) > 1 else set()
    if choices:
        raise DataError(
            f"{name}: the split {split!r} may be any of {', '.join(sorted(choices))}: give the path of a file (each as "
            "a separate source if you want all of them), or a split that names only one of them."
        )


def _load_saved(folder: Path, split: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not a folder that `datasets` can load ({error}); save it again.") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise DataError(f"{folder}: no split {split!r}; set split to one of {sorted(map(str, loaded))}.")
    return loaded[split]


def _load_from_hub(name: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except ConnectionError as error:
        raise DataError(
            f"{name}: there is no such local path, and the Hub cannot be reached ({error}); "
            "check the path or the network, or download the dataset first and give its folder."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: the Hub dataset cannot be loaded, split {split!r} ({error}); check both.") from error


def _numbered(rows: Any, name: str) -> Iterator[Row]:
    for number, fields in enumerate(rows, start=1):
        yield Row(f"{name} row {number}", fields)
