"""The protocol of a reward: its call and its return value."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from numbers import Real
from typing import Any, NamedTuple, Protocol, runtime_checkable

from falign.errors import NonFiniteRewardError, RewardError
from falign.raised import code_lines, completion_at_fault, raised_message

__all__ = [
    "ARGUMENTS",
    "ComparingReward",
    "DatedReward",
    "LoadsModel",
    "Prompt",
    "ReadsFile",
    "Reward",
    "RowReward",
    "Scores",
    "ScoringReward",
    "call_reward",
    "check_rewards",
    "column",
    "place_of",
    "reward_raised",
    "select_columns",
]

ARGUMENTS = frozenset({"prompts", "completions", "place", "prompt_ids", "completion_ids"})
"""Names of arguments that do not come from the data."""

Prompt = str | list[dict[str, str]]
"""Text, or turns with ``role`` and ``content``."""


@dataclass(frozen=True)
class LoadsModel:
    """Marks an argument of a built-in reward: the path of a model.

    Attributes:
        reads_policy_ids: Whether the model is given the policy's token ids, so that it must have its tokens.
    """

    reads_policy_ids: bool = False


@dataclass(frozen=True)
class ReadsFile:
    """Marks an argument of a built-in reward: the path of a file that it reads."""


@runtime_checkable
class Reward(Protocol):
    """Any callable with the usual signature of reward functions, called with keyword arguments.

    It may name only the arguments that it reads, or take all columns.
    """

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """Return one value per completion, in their order; None where the reward does not apply.

        Args:
            prompts: The prompt of each completion.
            completions: Their texts, without the stop token.
            columns: The columns of the data by name, and ``prompt_ids``, ``completion_ids`` and ``place``; each a list
                with one value per completion.
        """
        ...


@runtime_checkable
class DatedReward(Protocol):
    """A reward whose inputs contain the date, such as a model with a date in its chat template."""

    def fix_date(self, date: datetime) -> None:
        """Write this date from now on."""
        ...


class Scores(NamedTuple):
    """Scores of a batch, with counts of failures.

    Attributes:
        values: One per completion; None where the reward does not apply.
        timeouts: Calls that were stopped at their deadline.
        errors: Calls that raised.
        message: Message of the first error, with its place; ``""`` if there is none.
        measured: Further values to log as ``reward/NAME/KEY``, by key.
    """

    values: list[float | None]
    timeouts: int = 0
    errors: int = 0
    message: str = ""
    measured: Mapping[str, list[float]] = {}


@runtime_checkable
class ComparingReward(Protocol):
    """A reward that may compare the completions of a prompt with each other."""

    @property
    def compares(self) -> bool:
        """True if it needs two or more completions of a prompt in one call."""
        ...


@runtime_checkable
class RowReward(Protocol):
    """A reward that reports rows whose completions it cannot judge, before there are any."""

    def row_errors(self, prompts: list[Any], **columns: list[Any]) -> list[str | None]:
        """Return for each row why its completions cannot be judged; None if they can.

        Args:
            prompts: One per row.
            columns: One value per row; ``prompt_ids`` and ``place`` among them.

        Raises:
            RewardError: No row can be judged, for example because a column does not exist.
        """
        ...


@runtime_checkable
class ScoringReward(Reward, Protocol):
    """A reward that also counts its failures."""

    def score(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> Scores:
        """Return values and counts; the arguments are those of the call."""
        ...


def call_reward(
    reward: Reward,
    prompts: list[Any],
    completions: list[str],
    columns: Mapping[str, list[Any]],
    *,
    name: str,
) -> Scores:
    """Call a reward with the columns that it takes, and check the returned values.

    Args:
        reward: Any callable of the protocol.
        prompts: The prompt of each completion.
        completions: Their texts.
        columns: One list per column, each as long as ``completions``; ``place`` has the places of the rows.
        name: The reward's name in messages.

    Raises:
        RewardError: The reward raised, or returned invalid values.
    """
    places = columns.get("place")
    if len(prompts) != len(completions):
        raise RewardError(f"reward {name}: {len(prompts)} prompts for {len(completions)} completions; give as many.")
    for key, values in columns.items():
        if len(values) != len(completions):
            raise RewardError(
                f"reward {name}: column {key!r} has {len(values)} values for {len(completions)} completions; "
                "repeat each row's value for every completion of its prompt."
            )
    given = {"prompts": prompts, "completions": completions, **columns}
    if isinstance(reward, ScoringReward):
        scores = reward.score(**select_columns(reward.score, given))
    else:
        try:
            returned = reward(**select_columns(reward, given))
        except RewardError:
            raise
        except (Exception, SystemExit) as error:
            raise reward_raised(error, name=name, completions=completions, places=places) from error
        scores = Scores(returned)
    return scores._replace(values=check_rewards(scores.values, len(completions), name=name, places=places))


def reward_raised(
    error: BaseException,
    *,
    name: str,
    completions: Sequence[str],
    places: Sequence[str] | None,
    objects: Sequence[Any] = (),
    hint: str = "",
) -> RewardError:
    """Return the error that reports an exception in a reward, with its code lines and, if known, the completion.

    Args:
        error: The exception.
        name: The reward's name in messages.
        completions: The completions of the call.
        places: Places of their prompts.
        objects: The argument for each completion, if it is not the text.
        hint: A further sentence, after a space.
    """
    at_fault = completion_at_fault(error, completions)
    if at_fault is None:
        at_fault = completion_at_fault(error, objects)
    if at_fault is None:
        where, text = f"completions of {place_of(places, 0)} to {place_of(places, len(completions) - 1)}", None
    else:
        where, text = place_of(places, at_fault), completions[at_fault]
    message = raised_message(f"{type(error).__name__}: {error}", code_lines(error), text)
    return RewardError(f"reward {name}, {where}: {message}\nFix the function.{hint}")


def select_columns(function: Callable[..., Any], columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the arguments that a callable takes: those it names, or all if it has ``**columns``.

    Args:
        function: Any callable; its arguments are given by name.
        columns: By name, ``prompts`` and ``completions`` among them.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(columns)
    named = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    return {name: values for name, values in columns.items() if name in named}


def check_rewards(values: Any, count: int, *, name: str, places: Sequence[str] | None = None) -> list[float | None]:
    """Return rewards as plain floats.

    Args:
        values: The return value of a reward.
        count: Number of completions of the call.
        name: The reward's name in messages.
        places: Places of the prompts, for messages.

    Raises:
        RewardError: It is not a list, has another length, or has a value that is neither a finite number nor None.
    """
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"reward {name} returned a {type(values).__name__}; it must return a list with one float or None per "
            "completion (tensors and arrays: .tolist())."
        )
    if len(values) != count:
        raise RewardError(
            f"reward {name} returned {len(values)} values for {count} completions (the first of them of "
            f"{place_of(places, 0)}); return one per completion, None where the reward does not apply."
        )
    return [_checked(value, f"reward {name}, {place_of(places, i)}") for i, value in enumerate(values)]


def _checked(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real):
        raise RewardError(f"{where}: the value is a {type(value).__name__}, {value!r:.80}; return a float or None.")
    number = float(value)
    if not math.isfinite(number):
        raise NonFiniteRewardError(f"{where}: the value is {number}; return a finite number, or None to leave it out.")
    return number


def column(columns: Mapping[str, list[Any]], name: str, *, reward: str) -> list[Any]:
    """Return a column that a reward needs.

    Args:
        columns: All columns, by name.
        name: Name of the column.
        reward: The reward's name in messages.

    Raises:
        RewardError: The column is missing.
    """
    if name not in columns:
        raise RewardError(
            f"reward {reward} reads the column {name!r}, and the data has {sorted(columns.keys() - ARGUMENTS)}: name "
            "the column that holds it, or add it to the rows."
        )
    return columns[name]


def place_of(places: Sequence[str] | None, index: int) -> str:
    """Return the place of a completion's prompt, for messages.

    Args:
        places: One per completion, or None.
        index: Index of the completion.
    """
    return f"completion {index}" if places is None or not 0 <= index < len(places) else str(places[index])
