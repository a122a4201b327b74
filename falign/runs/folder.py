"""The folder of a run: one process claims it, and every file in it is complete."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from falign.durable import remove_leftovers, sync_file, write_whole
from falign.errors import ConfigError, ModelError, TrainingError, without_passwords
from falign.json_lines import read_journal
from falign.plain_yaml import plain_yaml
from falign.references import REFERENCE
from falign.runfile.config import RunConfig
from falign.runfile.training_arguments import OBSERVE
from falign.runs.checkpoints import checkpoints, holds, log_marks, newest_undamaged, step_of, weight_sums, why_damaged
from falign.runs.inputs import RunInputs, RunRows
from falign.runs.lock import LOCK, RunLock

__all__ = ["RunFolder", "is_held_out", "log_line", "versions"]

PATHS = frozenset({"path", "paths", "chat_template", "cache", "root", "init", "shared_dir"})
"""Fields of the run file that may hold a local path."""

MODELS = frozenset({"path", "paths", "init"})
"""Fields that name a model or an adapter."""

SERVER_FIELDS = frozenset(f"rollout.engine.{name}" for name in ("url", "shared_dir", "timeout", "wait"))
OBSERVER_FIELDS = frozenset(
    f"training.{name}"
    for name in (
        *("save_steps", "save_minutes", "save_total_limit", "logging_steps", "eval_steps", "report_to", "skip_bad"),
        *(f"extra.{name}" for name in OBSERVE),
    )
)
WHEN_EVALUATED = frozenset({"training.eval_steps", "training.extra.eval_delay"})
"""Settings of :data:`OBSERVER_FIELDS` that decide the course of a run whose evaluations compare models."""

BY_CONTENT = re.compile(
    r"model\.(path|revision|chat_template)|(data|prompts)\.(train|eval)\.\d+\.path|rehearsal\.path"
    r"|(reference|references\.\w+)\.(path|paths|cache|url|timeout|wait)|rewards\.\d+\.((transform\.)?samples|template)"
    r"|rewards\.\d+\.endpoint\.(timeout|retries|backoff|concurrency|cache|api_key_env|price_\w+|budget)"
)
"""Settings that are locations: the content there is hashed or named instead (:class:`RunInputs`, :class:`RunRows`).
With the address of a reference's server its limits may change, and so may the limits, the prices and the cache of a
judge."""

LENGTH_FIELDS = frozenset({"training.max_steps", "training.num_train_epochs"})
MAY_DIFFER = frozenset({"output_dir", "data.num_proc", "data.cache"}) | OBSERVER_FIELDS | LENGTH_FIELDS | SERVER_FIELDS
"""Settings that may differ when a run resumes, because they change no step already taken: the folder may have moved,
rows may be tokenized in other processes, other steps may be logged, saved and evaluated, bad steps may be skipped, and
another server may serve the same model.
The length of a run only decides its learning rates, which are compared on their own."""

FIRST_FILES = ("run.yaml", "manifest.json", "rows.txt", "metrics.jsonl", "completions.jsonl", "before.json")
"""Files that a run writes before its first step."""

FINISHED = ("summary.json", "samples.json")
"""Files that mark a run as finished."""

LEFTOVERS = frozenset({LOCK})
"""Files that a run leaves if it is killed before it writes its first file."""

TRAINING_ONLY = frozenset({"optimizer.pt", "scheduler.pt"})
"""Files of a checkpoint that only further training needs."""

PACKAGES = ("falign", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "trl")


class RunFolder:
    """``output_dir`` of a run.

    ======================  ==============================================================
    ``run.yaml``            the resolved run file
    ``manifest.json``       versions, model, reference identity, counts of the data, and content hashes of everything
                            that decides its steps
    ``rows.txt``            a digest of each row and of its prompt, in order: training rows and held-out rows
    ``metrics.jsonl``       one log per line
    ``checkpoint-N/``       trainable weights, optimizer, scheduler, random states (``damaged-`` before a damaged one)
    ``adapter/``            the trained adapter in PEFT's layout (``model/`` without adapter)
    ``adapter_...``         the files of ``adapter/`` or ``model/`` as hard links, for ``from_pretrained(output_dir)``
                            (not in runs of reward models, whose head is no part of them)
    ``reference/``          the last state of a moving reference (``references/NAME/`` for those of other names)
    ``completions.jsonl``   completions of an online run with their rewards
    ``samples.json``        prompts answered before and after
    ``summary.json``        held-out metrics before and after
    ``curves.png``          loss, rewards and log-ratios
    ``evaluation/NAME/``    results of ``falign evaluate``
    ``report.html``         the report of ``falign report``, with its plots in ``report-figures/``
    ======================  ==============================================================

    Args:
        path: The folder.
        writes: False for the processes of a run that do not write; one process writes for all.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes, self.lock = path, writes, RunLock(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Return an existing run.

        Raises:
            ConfigError: The path is not a run folder.
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
    def resume_command(self) -> str:
        """The command that resumes the run with its settings."""
        return f"falign train {shlex.quote(str(self.run_file))} --resume"

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

    def reference_state(self, name: str = REFERENCE) -> Path:
        """Return the folder with the last state of a moving reference."""
        return self.path / "reference" if name == REFERENCE else self.path / "references" / name

    @property
    def weights(self) -> Path:
        """The trained weights of a run without adapter."""
        return self.path / "model"

    def require_free(self) -> None:
        """Refuse a folder that is not empty.

        Raises:
            ConfigError: It holds another run, finished or in progress, or other files.
        """
        if self.run_file.is_file():
            self.lock.require_free()
            raise ConfigError(
                f"output_dir={self.path} holds another run: choose another folder, remove this one, or resume the run "
                f"by `{self.resume_command}`."
            )
        remove_leftovers(self.run_file)
        if self.path.exists() and (
            not self.path.is_dir() or any(each.name not in LEFTOVERS for each in self.path.iterdir())
        ):
            raise ConfigError(f"output_dir={self.path} exists and is not an empty folder: choose another.")

    def refuse_links(self) -> None:
        """Refuse a folder with a link that leads out of it: files written through it would land elsewhere.

        Raises:
            ConfigError: A link leads out of the folder; the message names it.
        """
        root = self.path.resolve()
        for place, folders, files in os.walk(self.path):
            for entry in (Path(place, name) for name in (*folders, *files)):
                target = Path(os.path.realpath(entry))  # Path.resolve raises where a link is its own target
                if entry.is_symlink() and not target.is_relative_to(root):
                    raise ConfigError(f"{entry} is a link that leads out of the run folder: remove it.")

    def require_same(self, config: RunConfig, *, new_rewards: bool = False) -> None:
        """Refuse to resume a run with settings that change its steps.

        Args:
            config: The settings to resume with.
            new_rewards: Whether its rewards may differ.

        Raises:
            ConfigError: Settings differ from those that the run began with; or the folder cannot be resumed.
        """
        if not self.run_file.is_file():  # the manifest comes later, and a run may have been killed before it
            RunFolder.open(self.path)
        self.refuse_links()
        if changed := self._changed_settings(config, new_rewards=new_rewards):
            only_rewards = not self._changed_settings(config, new_rewards=True)
            accept = ", accept the changed rewards with `new_rewards`," if only_rewards else ","
            raise ConfigError(
                f"{self.path} holds a run with other settings: {changed}. Set them as they were{accept} or start a new "
                "run in another output_dir."
            )

    def require_unedited(self, config: RunConfig) -> None:
        """Refuse the run file of this folder if it was edited after the run began.

        Args:
            config: Settings read from the run file.

        Raises:
            ConfigError: Settings differ from those that the run began with.
        """
        if changed := self._changed_settings(config):
            raise ConfigError(f"{self.run_file} was edited after the run began: {changed}. Set them as they were.")

    def _changed_settings(self, config: RunConfig, *, new_rewards: bool = False) -> str:
        """List up to five settings that would change steps of the run, with both values; ``""`` if there are none."""
        old, new = _flat(self.read_settings()), _flat(self.settings(config))
        may_differ = MAY_DIFFER - (WHEN_EVALUATED if config.training.compares_models else frozenset())
        keys = [
            key
            for key in sorted((old.keys() | new.keys()) - may_differ)
            if old.get(key) != new.get(key)
            and not (key not in old and _is_default(config, key))  # a field that the run is older than
            and not BY_CONTENT.fullmatch(key)
            and not (new_rewards and key.startswith("rewards."))
        ]
        return ", ".join(f"{key} ({old.get(key)!r} when it began, {new.get(key)!r} now)" for key in keys[:5])

    def read_settings(self) -> dict[str, Any]:
        """Return the resolved settings that the run began with, even if its run file has been edited since."""
        return self.read_inputs()["settings"] if self.began else self.read_run_file()

    def require_same_inputs(self, rows: RunRows, inputs: RunInputs, *, new_rewards: bool = False) -> None:
        """Refuse to resume a run if its rows or another input of its steps has changed.

        Args:
            rows: The present rows.
            inputs: The other present inputs.
            new_rewards: Whether its rewards may differ.

        Raises:
            ConfigError: An input has changed; the message names the first one and the remedy.
        """
        recorded = self.read_inputs()
        # With `new_rewards`, the present hash takes the place of the recorded one, so that it cannot differ.
        allowed = {"rewards": inputs.hashes["rewards"]} if new_rewards else {}
        changed = inputs.difference({**recorded["hashes"], **allowed})
        if changed is None and (changed := self.read_rows().difference(rows)) is not None:
            changed = f"{changed}: restore the file"
        if changed is not None:
            raise ConfigError(
                f"{self.path} cannot be resumed, because its steps would differ: {changed}; or start a new run in "
                "another output_dir."
            )

    def changes(self, inputs: RunInputs, *, new_rewards: bool) -> list[dict[str, Any]]:
        """Return the recorded changes of rewards and versions, and add the change at this resume, if there is one."""
        recorded, there = self.read_inputs(), checkpoints(self.path)
        if not there:
            return recorded["changes"]
        before: dict[str, Any] = {}
        if new_rewards and recorded["hashes"]["rewards"] != inputs.hashes["rewards"]:
            before |= {"rewards": recorded["hashes"]["rewards"], "settings": recorded["settings"]["rewards"]}
        if self.other_versions():
            before["versions"] = self.read_versions()
        return [*recorded["changes"], *([{"after_step": step_of(there[-1]), **before}] if before else [])]

    def read_versions(self) -> dict[str, str]:
        """Return the versions of Python and of the packages at the last start of the run."""
        return self.read_manifest().get("versions", {})

    def other_versions(self) -> str:
        """List the versions that have changed since the last start of the run; ``""`` if there are none."""
        old, new = self.read_versions(), versions()
        changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        return ", ".join(f"{name} ({old.get(name)} then, {new.get(name)} now)" for name in changed)

    @staticmethod
    def settings(config: RunConfig) -> dict[str, Any]:
        """Return the resolved run file in the form that the manifest stores."""
        return json.loads(_json(_plain(config)))

    @property
    def began(self) -> bool:
        """True if the run has written its manifest."""
        return (self.path / "manifest.json").is_file()

    def read_inputs(self) -> dict[str, Any]:
        """Return the manifest's record of everything that decides the run's steps.

        Raises:
            ConfigError: The manifest has no such record.
        """
        found = self.read_manifest().get("inputs")
        if not isinstance(found, dict) or found.keys() != {"run", "date", "settings", "hashes", "rows", "changes"}:
            raise ConfigError(
                f"{self.path / 'manifest.json'} has no record of the run's inputs, so they cannot be compared: "
                "restore it, resume with the version of falign in its 'versions', or start a new run."
            )
        return found

    def read_date(self) -> datetime:
        """Return the date that chat templates write in this run."""
        return datetime.fromisoformat(self.read_inputs()["date"])

    def read_rows(self) -> RunRows:
        """Return the digests of the run's rows, for training and held out.

        Raises:
            ConfigError: They are missing or damaged.
        """
        file, recorded = self.path / "rows.txt", self.read_inputs()["rows"]
        rows = RunRows.read(file.read_text(encoding="ascii", errors="replace")) if file.is_file() else None
        if rows is None or rows.digest != recorded:
            raise ConfigError(f"{file} is missing or damaged: restore it, or start a new run in another output_dir.")
        return rows

    def claim(self, config: RunConfig) -> None:
        """Create the folder, lock it, and write the resolved run file.

        Raises:
            ConfigError: Another process has claimed the folder.
        """
        if self.writes and not self.lock.is_held:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.take()
            self.require_free()
        self._write("run.yaml", yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True))

    def release(self) -> None:
        """Undo :meth:`claim` of a run that ended before its first step, so that its folder can be claimed again."""
        if not self.writes:
            return
        for name in FIRST_FILES:
            (self.path / name).unlink(missing_ok=True)

    def read_run_file(self) -> dict[str, Any]:
        """Return the resolved run file as plain values."""
        try:
            found = plain_yaml(self.run_file.read_text(encoding="utf-8"), place=str(self.run_file))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.run_file} is damaged ({error}): restore it, or start a new run.") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{self.run_file} is damaged (no sections): restore it, or start a new run.")
        return found

    def write_json(self, name: str, value: Any) -> None:
        """Write one JSON file atomically."""
        self._write(name, _json(value) + "\n")

    def write_rows(self, rows: RunRows) -> None:
        """Write the digests of the run's rows; the manifest, which has their hash, is written after them."""
        self._write("rows.txt", rows.text)

    def record_model(self, trained: Path, **record: Any) -> None:
        """Add the checksums of the trained weights, and further entries, to the manifest."""
        self.write_json("manifest.json", {**self.read_json("manifest.json"), "trained": weight_sums(trained), **record})

    def show_model(self, trained: Path) -> None:
        """Show the files of the trained model in the run folder itself, where ``from_pretrained`` looks for them.

        They are hard links, so that they take no space; copies where the disk has none.

        Args:
            trained: The folder of the trained model.
        """
        for file in trained.iterdir():
            shown = self.path / file.name
            shown.unlink(missing_ok=True)
            try:
                shown.hardlink_to(file)
            except OSError:  # such as FAT, or some network disks
                shutil.copyfile(file, shown)

    def hide_model(self) -> None:
        """Remove what :meth:`show_model` has written."""
        for trained in (self.adapter, self.weights):
            for file in trained.iterdir() if trained.is_dir() else ():
                (self.path / file.name).unlink(missing_ok=True)

    def require_own_model(self, trained: Path) -> None:
        """Refuse a checkpoint or trained weights that are damaged or belong to another run.

        Args:
            trained: Their folder.

        Raises:
            ModelError: A file differs; the message names it and the remedy.
        """
        if trained in checkpoints(self.path):
            run = self.read_inputs()["run"]
            if (reason := why_damaged(trained, run=run, unread=TRAINING_ONLY)) is not None:
                raise ModelError(f"{trained} is damaged ({reason}): restore it, or name another checkpoint.")
            return
        recorded = self.read_manifest().get("trained")
        if recorded is None:  # finished before falign recorded it
            return
        found = weight_sums(trained)
        name = next((name for name in sorted(recorded | found) if recorded.get(name) != found.get(name)), None)
        if name is not None:
            raise ModelError(
                f"{trained / name} is not what {self.path} has trained (its checksum is not that of manifest.json): "
                f"restore it, or remove {trained}, and `{self.resume_command}` writes it again."
            )

    @classmethod
    def require_own_models(cls, config: RunConfig) -> None:
        """Refuse adapters and models of other runs, named in a run file, that differ from what those runs trained.

        Args:
            config: The run file; paths of its model, adapter and references are checked.

        Raises:
            ModelError: A file differs; the message names it and the remedy.
        """
        named = config.model_dump(mode="json", include={"model", "adapter", "reference", "references"})
        for path in dict.fromkeys(_paths(named)):
            given = Path(path).expanduser()
            run = given if (given / "manifest.json").is_file() else given.parent
            if not ((run / "run.yaml").is_file() and (run / "manifest.json").is_file()):
                continue
            folder = cls(run)
            for trained in (folder.adapter, folder.weights) if given == run else (given,):
                if trained.is_dir():
                    folder.require_own_model(trained)

    def read_json(self, name: str) -> Any:
        """Return one JSON file.

        Raises:
            ConfigError: The run has not written it yet, or it is damaged.
        """
        file = self.path / name
        if not file.is_file():
            raise ConfigError(f"{file} is missing: finish the run, which then writes it, by `{self.resume_command}`.")
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file} is damaged ({error}): `{self.resume_command}` writes it again.") from error

    def read_manifest(self) -> dict[str, Any]:
        """Return the run's manifest.

        Raises:
            ConfigError: It is missing or damaged.
        """
        found = self.read_json("manifest.json")
        needed = {"base_weights", "base_config"}
        if not isinstance(found, dict) or not isinstance(found.get("reference"), dict) or not needed <= found.keys():
            raise ConfigError(
                f"{self.path / 'manifest.json'} is damaged (an entry is missing): restore it, or start a new run."
            )
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """Return all logs; an incomplete last line, which a killed run leaves, is skipped.

        Raises:
            ConfigError: Another line is damaged.
        """
        return list(read_journal(self.metrics_file))

    def restore_logs(self, checkpoint: Path, history: Sequence[dict[str, Any]], tell: Callable[[str], None]) -> None:
        """Truncate all logs to their state at a checkpoint; the resumed run writes the rest again.

        Args:
            checkpoint: The checkpoint that the run resumes from.
            history: All logs up to the checkpoint, as the checkpoint stores them.
            tell: Called with a message if lines were lost.

        Raises:
            TrainingError: Lines of completions are lost; the checkpoint does not store them.
        """
        marks = log_marks(checkpoint)
        completions = marks.get("completions.jsonl")
        if completions is not None and not holds(self.completions_file, completions):
            if self.completions_file.exists():
                raise TrainingError(
                    f"{self.completions_file} has lost or changed lines since {checkpoint.name}: restore it, or remove "
                    "it, and the run begins a new one."
                )
            tell(f"{self.completions_file} is missing: a new one begins at {checkpoint.name}.")
            completions = None
        for file, mark in ((self.completions_file, completions), (self.metrics_file, marks.get("metrics.jsonl"))):
            if mark is None:
                file.unlink(missing_ok=True)
            elif holds(file, mark):
                os.truncate(file, mark.bytes)
                sync_file(file)
            else:
                tell(
                    f"{file} has lost or changed lines since {checkpoint.name}: it is written again from the logs in "
                    "the checkpoint."
                )
                self._write(file.name, "".join(log_line(log) for log in history))

    def reopen(self) -> None:
        """Remove the files that mark the run as finished, before it continues to more steps."""
        self.hide_model()
        for name in FINISHED:
            (self.path / name).unlink(missing_ok=True)

    def last_checkpoint(self, tell: Callable[[str], None] = print) -> Path | None:
        """Return the newest undamaged checkpoint; newer, damaged ones are renamed and reported to ``tell``.

        Returns:
            None if the run has no checkpoint yet.

        Raises:
            TrainingError: All checkpoints are damaged, or the run is finished and has none.
        """
        if not checkpoints(self.path):
            found = None
        else:
            found = newest_undamaged(self.path, run=self.read_inputs()["run"], tell=tell)
        if found is None and (self.path / "summary.json").is_file():
            raise TrainingError(
                f"{self.path} is finished and has no checkpoint to resume from: start it again in another folder."
            )
        return found

    def _write(self, name: str, text: str) -> None:
        if self.writes:
            write_whole(self.path / name, text)


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
    """Return the run file with absolute local paths, so that the run can be used from any folder."""
    plain = config.model_dump(mode="json")
    plain["output_dir"] = str(config.output_dir.absolute())
    return {section: _with_whole_paths(value, section) for section, value in plain.items()}


def _with_whole_paths(value: Any, field: str) -> Any:
    if isinstance(value, dict):
        return {name: _with_whole_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_whole_paths(inner, field) for inner in value]
    # Longer texts cannot be paths, and Path.exists raises an error for them.
    if not isinstance(value, str) or field not in PATHS or len(value) >= 4096:
        return value
    path = Path(value).expanduser()
    # A value that does not exist as a path may be a name on the Hub; `cache` and `shared_dir` are always folders.
    return str(path.absolute()) if path.exists() or field in ("cache", "shared_dir") else value


def _paths(value: Any, field: str = "") -> Iterator[str]:
    """Return the values of all fields that name a model or an adapter."""
    if isinstance(value, dict):
        yield from (path for name, inner in value.items() for path in _paths(inner, name))
    elif isinstance(value, list):
        yield from (path for inner in value for path in _paths(inner, field))
    elif field in MODELS and isinstance(value, str):
        yield value


def is_held_out(log: dict[str, Any]) -> bool:
    """Return whether a log line belongs to an evaluation."""
    return any(name.startswith("eval_") for name in log)


def log_line(log: dict[str, Any]) -> str:
    """Return the line of ``metrics.jsonl`` for a log with its step.

    JSON has no NaN and no infinity: such values are left out, because strict readers refuse them.
    """
    finite = {name: v for name, v in log.items() if not isinstance(v, float) or math.isfinite(v)}
    return json.dumps({"step": log["step"], **finite}) + "\n"


def _json(value: Any) -> str:
    return without_passwords(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _is_default(config: RunConfig, path: str) -> bool:
    """Return whether the field at a path of :func:`_flat` has its default value."""
    section: Any = config
    *parents, name = path.split(".")
    for parent in parents:
        inner = {str(k): v for k, v in enumerate(section)} if isinstance(section, list) else dict(section)
        section = inner.get(parent, {})
    fields = type(section).model_fields if isinstance(section, BaseModel) else {}
    return name in fields and getattr(section, name) == fields[name].get_default(call_default_factory=True)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by their paths, as in ``data.train.0.path``."""
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}.{name}".strip(".")).items()}
    return {prefix: value}
