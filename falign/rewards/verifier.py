"""A reward from a function that judges one completion, run in a process that can be killed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from falign.errors import RewardError
from falign.rewards.base import Scores, column, place_of
from falign.rewards.child import Call, ChildPool, shared_pool
from falign.rewards.identity import Identity
from falign.rewards.outcomes import row_error, scores_of
from falign.templates import Template, columns_of

__all__ = ["Verifier"]


@dataclass(frozen=True)
class Verifier:
    """A call of ``function(completion=..., **arguments)`` for each completion, in separate processes.

    Attributes:
        name: Its name in messages.
        function: ``module:function``; it returns a number, or None where it does not apply.
        columns: The function's arguments that differ from row to row, each with the column that holds it.
        templates: Further such arguments, each with a template that has columns in braces (``"{db_id}.sqlite"``).
        parameters: Its other arguments, the same for all rows.
        timeout: Seconds per completion.
        failed: Value of a completion if its call timed out or raised; None leaves it out. Both are counted.
        pool: The pool of processes; None for the pool that all verifiers share.

    Raises:
        ValueError: A template cannot be read.
    """

    name: str
    function: str
    columns: Mapping[str, str] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 10.0
    failed: float | None = 0.0
    pool: ChildPool | None = None

    def __post_init__(self) -> None:
        for key, template in self.templates.items():
            try:
                columns_of(template)
            except ValueError as error:
                raise ValueError(
                    f"{key}={template!r} cannot be read ({error}): columns stand in braces by their names."
                ) from error

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        return self.score(prompts, completions, **columns).values

    def score(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> Scores:
        """Return values and counts.

        Args:
            prompts: Not read.
            completions: Their texts.
            columns: One value per completion.

        Raises:
            RewardError: A column is missing, or a row cannot be judged at all.
        """
        places = columns.get("place")
        rows = self._rows(columns, len(completions))
        calls = []
        for i, (text, row) in enumerate(zip(completions, rows, strict=True)):
            try:
                calls.append(self._call(text, row))
            except ValueError as error:
                raise RewardError(f"reward {self.name}, {place_of(places, i)}: {error}") from error
        outcomes = (self.pool or shared_pool()).run(calls)
        return scores_of(outcomes, name=self.name, failed=self.failed, places=places)

    def row_errors(self, prompts: list[Any], **columns: list[Any]) -> list[str | None]:
        """Judge an empty completion of each row, and return the reason if the row itself cannot be judged.

        Args:
            prompts: Not read.
            columns: One value per row.

        Raises:
            RewardError: A column is missing, or the function cannot be imported.
        """
        found: list[str | None] = [None] * len(prompts)
        calls: dict[bytes, Call] = {}  # rows with the same arguments are judged once
        places: dict[bytes, list[int]] = {}
        for i, row in enumerate(self._rows(columns, len(prompts))):
            try:
                call = self._call("", row)
            except ValueError as error:
                found[i] = str(error)
            else:
                arguments = pickle.dumps(call)
                calls.setdefault(arguments, call)
                places.setdefault(arguments, []).append(i)
        outcomes = (self.pool or shared_pool()).run(list(calls.values()))
        for indices, outcome in zip(places.values(), outcomes, strict=True):
            reason = row_error(outcome) or (
                f"an empty completion cannot be judged, {outcome.message}" if outcome.kind == "timeout" else None
            )
            for i in indices:
                found[i] = reason
        return found

    def _rows(self, columns: Mapping[str, list[Any]], count: int) -> list[dict[str, Any]]:
        """Return each row's values of the columns that are read."""
        names = {
            *self.columns.values(),
            *(name for template in self.templates.values() for name in columns_of(template)),
        }
        read = {name: column(columns, name, reward=self.name) for name in sorted(names)}
        return [{name: values[i] for name, values in read.items()} for i in range(count)]

    def _call(self, completion: str, row: Mapping[str, Any]) -> Call:
        varying = {key: row[name] for key, name in self.columns.items()}
        filled = {key: self._filled(template, row) for key, template in self.templates.items()}
        return Call(self.function, {"completion": completion, **self.parameters, **varying, **filled}, self.timeout)

    def identity(self) -> Identity:
        """Return the module of the function, and all its arguments."""
        settings = {
            "function": self.function,
            "columns": dict(self.columns),
            "templates": dict(self.templates),
            "parameters": dict(self.parameters),
            "timeout": self.timeout,
            "failed": self.failed,
        }
        return Identity(self.function.partition(":")[0], settings)

    def _filled(self, template: str, row: Mapping[str, Any]) -> str:
        if missing := [name for name in columns_of(template) if row[name] is None]:
            raise ValueError(f"the column {missing[0]!r}, which {template!r} needs, is missing")
        try:
            return Template().fill(template, row)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"the template {template!r} cannot be filled ({error}); name columns in braces") from error
