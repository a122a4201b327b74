"""A reward from a function that judges one completion, run where it can be killed."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from falign.errors import RewardError
from falign.rewards.base import Scores, column, place_of
from falign.rewards.child import Call, ChildPool, shared_pool
from falign.rewards.identity import Identity
from falign.rewards.outcomes import scores_of

__all__ = ["Verifier"]


@dataclass(frozen=True)
class Verifier:
    """Calls ``function(completion=..., **arguments)`` for each completion, in processes of their own.

    Attributes:
        name: What messages call it.
        function: ``module:function``; it returns a number, or None where it does not apply.
        columns: The function's arguments that differ from row to row, each with the column that holds it.
        templates: The same, each made of columns in braces (``"{db_id}.sqlite"``).
        parameters: Its other arguments.
        timeout: Seconds per completion.
        failed: What a completion is worth whose call timed out or raised; None leaves it out. Either is counted.
        pool: Where it runs; None for the pool that all verifiers share.
    """

    name: str
    function: str
    columns: Mapping[str, str] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 10.0
    failed: float | None = 0.0
    pool: ChildPool | None = None

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
        place = columns.get("place")
        varying = {key: column(columns, name, reward=self.name) for key, name in self.columns.items()}
        for key, template in self.templates.items():
            read = {name: column(columns, name, reward=self.name) for name in _fields(template)}
            varying[key] = [
                self._filled(template, {name: values[i] for name, values in read.items()}, place_of(place, i))
                for i in range(len(completions))
            ]
        calls = [
            Call(
                self.function,
                {"completion": text, **self.parameters, **{key: values[i] for key, values in varying.items()}},
                self.timeout,
            )
            for i, text in enumerate(completions)
        ]
        outcomes = (self.pool or shared_pool()).run(calls)
        return scores_of(outcomes, name=self.name, failed=self.failed, places=place)

    def identity(self) -> Identity:
        """Return the module of the function, and all that it is called with."""
        settings = {
            "function": self.function,
            "columns": dict(self.columns),
            "templates": dict(self.templates),
            "parameters": dict(self.parameters),
            "timeout": self.timeout,
            "failed": self.failed,
        }
        return Identity(self.function.partition(":")[0], settings)

    def _filled(self, template: str, row: Mapping[str, Any], place: str) -> str:
        try:
            return template.format_map(row)
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise RewardError(
                f"reward {self.name}, {place}: the template {template!r} cannot be filled ({error}); name columns in "
                "braces."
            ) from error


def _fields(template: str) -> list[str]:
    """Return the columns that a template names, without what follows a dot or a bracket."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    return [name.partition(".")[0].partition("[")[0] for name in names]
