"""The folder of a run: claimed once, every file in it whole."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from falign.durable import sync_folder
from falign.errors import ConfigError, TrainingError
from falign.json_lines import read_journal, split_lines
from falign.passwords import without_passwords
from falign.plain_yaml import plain_yaml
from falign.training.checkpoints import newest_whole
from falign.training.config import RunConfig
from falign.training.run_lock import LOCK, RunLock

__all__ = ["RunFolder", "is_held_out", "naming", "versions"]

PATHS = frozenset({"path", "paths", "chat_template", "cache", "root", "init", "shared_dir"})
"""Fields of the run file that may name something on the disk."""

SERVER = frozenset(f"rollout.engine.{name}" for name in ("url", "shared_dir", "timeout", "wait"))
MAY_DIFFER = frozenset({"output_dir", "training.skip_bad"}) | SERVER
"""Of a run that goes on: its folder may be written otherwise, or have moved, what stopped it may be skipped now, and
the server may be another one of the same model."""

LEFT = frozenset({".run.yaml.partial", LOCK})
"""All that there is of a run that was killed while it wrote its first file."""

PACKAGES = ("falign", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "trl")


class RunFolder:
    """``output_dir`` of a run.

    ======================  ==============================================================
    ``run.yaml``            the resolved run file
    ``manifest.json``       versions, model, reference identity, what became of the data
    ``metrics.jsonl``       one log a line
    ``checkpoint-N/``       trainable weights, optimizer, scheduler, random states (``damaged-`` before it: put aside)
    ``adapter/``            the trained adapter in PEFT's layout (``model/`` without adapter)
    ``reference/``          where a reference that moves has come to
    ``completions.jsonl``   in an online run, what the policy wrote and what it was worth
    ``samples.json``        prompts answered before and after
    ``summary.json``        held-out metrics before and after
    ``curves.png``          loss, rewards and log-ratios
    ``evaluation/NAME/``    what ``falign evaluate`` has measured
    ``report.html``         what ``falign report`` has written, with its plots in ``report-figures/``
    ======================  ==============================================================

    Args:
        path: The folder.
        writes: False for the processes of a run that leave the writing to another one.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes, self.lock = path, writes, RunLock(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Return an existing run.

        Raises:
            ConfigError: There is none.
        """
        folder = cls(Path(path))
        if not (folder.run_file.is_file() and (folder.path / "manifest.json").is_file()):
            raise ConfigError(
                f"{path} is not a run folder (no run.yaml and manifest.json): give the output_dir of a run."
            )
        folder.refuse_links()
        return folder

    @property
    def run_file(self) -> Path:
        """The resolved run file."""
        return self.path / "run.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per log."""
        return self.path / "metrics.jsonl"

    @property
    def completions_file(self) -> Path:
        """One JSON object per completion of an online run."""
        return self.path / "completions.jsonl"

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.path / "adapter"

    @property
    def reference(self) -> Path:
        """The last state of a reference that moves."""
        return self.path / "reference"

    @property
    def weights(self) -> Path:
        """The trained weights of a run without adapter."""
        return self.path / "model"

    def require_free(self) -> None:
        """Refuse a folder that holds anything.

        Raises:
            ConfigError: It holds another run, or other files.
        """
        if self.run_file.is_file():
            raise ConfigError(
                f"output_dir={self.path} holds another run: choose another folder, remove it, or go on with that run "
                "by --resume."
            )
        if self.path.exists() and (
            not self.path.is_dir() or any(each.name not in LEFT for each in self.path.iterdir())
        ):
            raise ConfigError(f"output_dir={self.path} exists and is not an empty folder: choose another.")

    def refuse_links(self) -> None:
        """Refuse a folder in which a link leads out of it: what is written there would go elsewhere.

        Raises:
            ConfigError: With the link.
        """
        root = self.path.resolve()
        for entry in (*self.path.iterdir(), *self.path.glob("evaluation/*")):
            target = Path(os.path.realpath(entry))  # Path.resolve raises where a link is its own target
            if entry.is_symlink() and not target.is_relative_to(root):
                raise ConfigError(f"{entry} is a link that leads out of the run folder: remove it.")

    def require_same(self, config: RunConfig) -> None:
        """Refuse to go on with a run under another run file.

        Raises:
            ConfigError: With the fields that differ.
        """
        if not self.run_file.is_file():  # the manifest comes later, and a run may have been killed before it
            RunFolder.open(self.path)
        self.refuse_links()
        old, new = _flat(self.read_run_file()), _flat(_plain(config))
        keys = (old.keys() | new.keys()) - MAY_DIFFER
        different = sorted(key for key in keys if old.get(key) != new.get(key))
        if different:
            shown = ", ".join(f"{key} ({old.get(key)!r} there, {new.get(key)!r} now)" for key in different[:5])
            raise ConfigError(f"{self.path} holds a run with other settings: {shown}. Resume with the same run file.")

    def claim(self, config: RunConfig) -> None:
        """Create the folder, keep others out of it, and write the resolved run file.

        Raises:
            ConfigError: Another process was first.
        """
        if self.writes and not self.lock.is_held:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.take()
            self.require_free()
        self._write("run.yaml", yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True))

    def release(self) -> None:
        """Undo :meth:`claim` where a run ended before its first step, so that its folder can be claimed again."""
        if not self.writes:
            return
        for name in ("run.yaml", "manifest.json", "metrics.jsonl", "completions.jsonl", "before.json"):
            (self.path / name).unlink(missing_ok=True)

    def read_run_file(self) -> dict[str, Any]:
        """Return the resolved run file as plain values."""
        try:
            found = plain_yaml(self.run_file.read_text(encoding="utf-8"), place=str(self.run_file))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.run_file} is damaged ({error}): restore it, or run anew.") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{self.run_file} is damaged (no sections): restore it, or run anew.")
        return found

    def write_json(self, name: str, value: Any) -> None:
        """Write one JSON file, whole or not at all."""
        self._write(name, without_passwords(json.dumps(value, indent=2, ensure_ascii=False, default=str)) + "\n")

    def read_json(self, name: str) -> Any:
        """Return one JSON file.

        Raises:
            ConfigError: The run has not come so far.
        """
        file = self.path / name
        if not file.is_file():
            raise ConfigError(f"{file} is not there: the run has not come so far. Go on with it by --resume.")
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{file} is damaged ({error}): go on with the run by --resume to write it anew."
            ) from error

    def read_manifest(self) -> dict[str, Any]:
        """Return what the run recorded of itself.

        Raises:
            ConfigError: It is damaged.
        """
        found = self.read_json("manifest.json")
        if not isinstance(found, dict) or not isinstance(found.get("reference"), dict) or "base_weights" not in found:
            raise ConfigError(f"{self.path / 'manifest.json'} is damaged (a part is missing): restore it, or run anew.")
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """Return all logs; half a last line, of a run that was killed while it wrote, is none.

        Raises:
            ConfigError: Another line is damaged.
        """
        return list(read_journal(self.metrics_file))

    def forget_after(self, step: int, *, evaluated: bool) -> None:
        """Drop what a resumed run writes again: all of later steps.

        Args:
            step: Of the checkpoint from which it goes on.
            evaluated: Whether the evaluation at that step is older than the checkpoint; else it comes again too.
        """
        last_evaluated = step if evaluated else step - 1
        kept = [
            json.dumps(log) for log in self.metrics() if log["step"] <= (last_evaluated if is_held_out(log) else step)
        ]
        self._write("metrics.jsonl", "".join(f"{line}\n" for line in kept))
        if self.completions_file.is_file():
            lines = split_lines(self.completions_file.read_text(encoding="utf-8", errors="replace"))
            self._write(
                "completions.jsonl", "".join(f"{line}\n" for line in lines if _sampled_by(line, step, last_evaluated))
            )

    def last_checkpoint(self, tell: Callable[[str], None] = print) -> Path | None:
        """Return the newest whole checkpoint; newer ones that are damaged are put aside, and ``tell`` is told.

        Returns:
            None where the run has not come to its first checkpoint.

        Raises:
            TrainingError: It has checkpoints, and none is whole; or it is finished and has none.
        """
        found = newest_whole(self.path, tell=tell)
        if found is None and (self.path / "summary.json").is_file():
            raise TrainingError(
                f"{self.path} is finished and has no checkpoint to resume from: start it anew in another folder."
            )
        return found

    def _write(self, name: str, text: str) -> None:
        if not self.writes:
            return
        partial = self.path / f".{name}.partial"
        try:
            with naming(self.path / name), partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path / name)
            sync_folder(self.path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an error of writing it: the system's own (a full disk) does not."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _plain(config: RunConfig) -> dict[str, Any]:
    """The run file with local paths written whole, so that the run can be used from any folder."""
    plain = config.model_dump(mode="json")
    plain["output_dir"] = str(config.output_dir.absolute())
    return {section: _with_whole_paths(value, section) for section, value in plain.items()}


def _with_whole_paths(value: Any, field: str) -> Any:
    if isinstance(value, dict):
        return {name: _with_whole_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_whole_paths(inner, field) for inner in value]
    if not isinstance(value, str) or field not in PATHS or len(value) >= 4096:
        return value
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() or field in ("cache", "shared_dir") else value


def is_held_out(log: dict[str, Any]) -> bool:
    """Whether a log is that of an evaluation."""
    return any(name.startswith("eval_") for name in log)


def _sampled_by(line: str, step: int, last_evaluated: int) -> bool:
    """Whether a completion was there when the checkpoint of a step was written; half a line of a killed run was not."""
    try:
        sample = json.loads(line)
    except ValueError:
        return False
    return sample["step"] <= last_evaluated if sample["held_out"] else sample["step"] < step


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}.{name}".strip(".")).items()}
    return {prefix: value}
