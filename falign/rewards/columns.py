"""Columns that rewards receive besides the text of prompts: those of the rows, and each row's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from falign.data import PromptRow
from falign.errors import ConfigError
from falign.rewards import RewardSum
from falign.rewards.base import ARGUMENTS

__all__ = ["reward_columns", "row_check"]


def reward_columns(rows: Sequence[PromptRow]) -> dict[str, list[Any]]:
    """Return one list per column of the rows, with ``place`` and ``prompt_ids``; None where a row lacks the column.

    Args:
        rows: One per completion, or one per prompt.

    Raises:
        ConfigError: A column has the name of an argument that rewards are given anyway.
    """
    names = dict.fromkeys(name for row in rows for name in row.columns)
    if clashing := sorted(names.keys() & ARGUMENTS):
        row = next(row for row in rows if clashing[0] in row.columns)
        raise ConfigError(
            f"{row.place}: the column {clashing[0]!r} has the name of an argument of rewards, which is not the column: "
            "rename it, or remove it from the rows."
        )
    columns: dict[str, list[Any]] = {name: [row.columns.get(name) for row in rows] for name in names}
    return columns | {"place": [row.place for row in rows], "prompt_ids": [list(row.prompt_ids) for row in rows]}


def row_check(rewards: RewardSum) -> Callable[[Sequence[PromptRow]], list[str | None]]:
    """Return what says of each prompt why its completions could not be judged, for :func:`falign.data.load_prompts`.

    Args:
        rewards: Those that will judge.
    """

    def check(rows: Sequence[PromptRow]) -> list[str | None]:
        return rewards.row_errors([row.prompt for row in rows], **reward_columns(rows))

    return check
