"""A run file in the making: the other library's settings as they are read, and what becomes of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from falign.choices import shown, similar
from falign.errors import NAMES, ConfigError
from falign.foreign.rows import Row, Value

__all__ = ["Launch", "Translation"]

LAUNCH = {"fsdp", "fsdp_config", "deepspeed", "accelerate_config", "num_processes"}
"""Settings that become options of the command."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Launch:
    """How several processes share the run.

    Attributes:
        kind: ``ddp`` or ``fsdp2``; None for a single process.
        processes: Their number; None is one per GPU.
    """

    kind: str | None = None
    processes: int | None = None

    @property
    def options(self) -> str:
        """The options of ``falign train``, with a space before them; empty for a single process."""
        if self.kind is None:
            return ""
        return f" --launch {self.kind}" + ("" if self.processes is None else f" --processes {self.processes}")


@dataclass
class Translation:
    """The settings of another library, and the run file that they become.

    Attributes:
        library: Its name, for messages: ``TRL``.
        command: What messages call its settings: ``trl dpo``.
        given: The settings of the user.
        defaults: The library's defaults of the settings that are copied or read.
        rows: The counterpart of each setting.
        values: The run file as nested mappings.
        origins: The setting that each path of the run file comes from, for comments.
        by_default: Paths whose value comes from the library's defaults alone.
        differences: Where the run differs although all settings are translated.
        unused: Settings that change no result, each with the reason.
        refusals: Settings that falign cannot carry, as complete sentences.
        launch: How several processes share the run.
        sections: Settings that only hold others.
    """

    library: str
    command: str
    given: Mapping[str, Value]
    defaults: Mapping[str, Value]
    rows: Mapping[str, Row]
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    by_default: set[str] = field(default_factory=set)
    differences: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    launch: Launch = Launch()
    sections: frozenset[str] = frozenset()
    _read: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Value:
        """Return a setting, or the library's default; the setting counts as read."""
        self._read.add(name)
        value = self.given.get(name, self.defaults.get(name))
        return _number(value) if isinstance(value, str) and not isinstance(self.defaults.get(name), str) else value

    def is_given(self, *names: str) -> bool:
        """Return whether the user gave one of the settings."""
        return any(name in self.given for name in names)

    def put(self, path: str, value: Value, *names: str) -> None:
        """Write a field of the run file.

        Args:
            path: Its path, as ``section.field``.
            value: Its value.
            names: The settings that it comes from, for the comment.
        """
        *sections, last = path.split(".")
        target = self.values
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
        given = [name for name in names if name in self.given]
        self.origins[path] = ", ".join(given) if given else f"{self.library}'s default"
        if not given:
            self.by_default.add(path)

    def refuse(self, name: str, reason: str) -> None:
        """Refuse a setting; all refusals are reported together.

        Args:
            name: The setting.
            reason: A sentence without its end, which may name the remedy.
        """
        self._read.add(name)
        value = "" if NAMES.search(name) or name not in self.given else f": {shown(self.given[name])}"
        self.refusals.append(f"{name}{value} has no counterpart: {reason}.")

    def differ(self, sentence: str) -> None:
        """Record a difference that the user must know of."""
        self.differences.append(sentence)

    def require_known(self, others: Iterable[str] = ()) -> None:
        """Refuse settings that the library does not have.

        Args:
            others: Settings that are known although they have no row.

        Raises:
            ConfigError: There are some; the message has the nearest names.
        """
        known = {*self.rows, *others}
        lines = []
        for name in self.given:
            if name not in known:
                close = similar(name, known, cutoff=0.7)
                lines.append(f"unknown setting {name!r}{f': did you mean {close}?' if close else ''}")
        if lines:
            raise ConfigError(
                f"{self.command}: "
                + "\n  ".join(lines)
                + "\nNothing is dropped in silence: correct each name, or remove it."
            )

    def apply_rows(self) -> None:
        """Copy the settings that are copied, and record those that are unused or refused."""
        for name, row in self.rows.items():
            if row.use == "copied" and (name in self.given or name in self.defaults):
                value = self[name]
                self.put(row.fields[0], value if row.convert is None else row.convert(value), name)
            elif name in self.given and row.use == "unused":
                self._read.add(name)
                self.unused[name] = f"{row.note}: {' or '.join(row.fields)}" if row.fields else row.note
            elif name in self.given and row.use == "refused" and not self._is_harmless(name, row):
                self.refuse(name, row.note)

    def _is_harmless(self, name: str, row: Row) -> bool:
        value = self[name]
        return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in row.harmless)

    def finish(self) -> None:
        """List the settings that were given and are the source of no field, with the reason.

        Raises:
            ConfigError: Settings were refused; the message has them all.
        """
        told = {name for names in self.origins.values() for name in names.split(", ")} | self.unused.keys()
        told |= {word for sentence in self.differences for word in re.findall(r"[\w.]+", sentence)}
        for name in self.given.keys() - told:
            row = self.rows[name]
            if name not in self._read and name not in self.defaults and row.fields:
                self.refuse(name, f"{self.command} has no such setting; here it would be {' or '.join(row.fields)}")
            elif name not in self._read:
                self.unused[name] = "without effect beside the other settings"
            elif name not in self.sections:
                self.unused[name] = "the run has it so without a setting"
        if self.launch.kind is not None:
            for name in LAUNCH & self.unused.keys():
                self.unused[name] = f"it is an option of the command:{self.launch.options}"
        self.unused = {name: self.unused[name] for name in [*self.given, *self.unused] if name in self.unused}
        if self.refusals:
            raise ConfigError(f"{self.command}: " + "\n  ".join(self.refusals))


def _number(text: str) -> Value:
    """Return the number that a text is; YAML reads 1e-5 as a text."""
    return float(text) if _NUMBER.fullmatch(text) and not text.isdigit() else int(text) if text.isdigit() else text
