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
    """Any callable with the ecosystem's signature, called by name.

    It may name just those of the arguments that it reads, or take all columns.
    """

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """Return one value per completion, in their order; None where the reward does not apply.

        Args:
            prompts: The prompt of each completion.
            completions: Their texts, without the stop token.
            columns: One value per completion, under the names of the data's columns; what else is known of the
                completions (``prompt_ids``, ``completion_ids``, ``place``) comes the same way.
        """
        ...


@runtime_checkable
class DatedReward(Protocol):
    """A reward that writes the date into its inputs, such as a model behind a chat template with a date."""

    def fix_date(self, date: datetime) -> None:
        """Judge as on that date from now on."""
        ...


class Scores(NamedTuple):
    """Scores of a batch, with counts of failures.

    Attributes:
        values: One per completion; None where the reward does not apply.
        timeouts: Calls that were stopped at their deadline.
        errors: Calls that raised.
        message: Of the first of these, with its place; ``""`` where there is none.
    """

    values: list[float | None]
    timeouts: int = 0
    errors: int = 0
    message: str = ""


@runtime_checkable
class RowReward(Protocol):
    """A reward that reads columns, and can say before any completion is there which rows it cannot judge."""

    def row_errors(self, prompts: list[Any], **columns: list[Any]) -> list[str | None]:
        """Return for each row why no completion of it can be judged; None where it can.

        Args:
            prompts: One per row.
            columns: One value per row; ``prompt_ids`` and ``place`` among them.

        Raises:
            RewardError: No row can be judged: a column that is read does not exist, for instance.
        """
        ...


@runtime_checkable
class ScoringReward(Reward, Protocol):
    """A reward that also counts what went wrong."""

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
    """Call a reward with the columns that it takes, and check what it returns.

    Args:
        reward: Any callable of the protocol.
        prompts: The prompt of each completion.
        completions: Their texts.
        columns: One list per column, each as long as ``completions``; ``place`` says where the rows came from.
        name: What messages call the reward.

    Raises:
        RewardError: The reward raised, or returned something that is no reward.
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
    """Return the error that tells of an exception in a reward: its lines, and the completion where that is known.

    Args:
        error: What was raised.
        name: What messages call the reward.
        completions: Those that it was given.
        places: Where their prompts came from.
        objects: What it was given for each of them, where that is not the text.
        hint: A further sentence, with a space before it.
    """
    at_fault = completion_at_fault(error, completions)
    if at_fault is None:
        at_fault = completion_at_fault(error, objects)
    if at_fault is None:
        where, text = f"completions of {place_of(places, 0)} to {place_of(places, len(completions) - 1)}", None
    else:
        where, text = place_of(places, at_fault), completions[at_fault]
    message = raised_message(f"{type(error).__name__}: {error}", code_lines(error), text)
    return RewardError(f"reward {name}, {where}: {message}\nMend the function.{hint}")


def select_columns(function: Callable[..., Any], columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Return those arguments that a callable takes: the ones it names, or all where it has ``**columns``.

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
        values: What a reward returned.
        count: How many completions it was given.
        name: What messages call the reward.
        places: Where the prompts came from, for messages.

    Raises:
        RewardError: It is no list, has another length, or has a value that is neither a finite number nor None.
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
    """Return a column that a reward cannot do without.

    Args:
        columns: By name.
        name: The one wanted.
        reward: What messages call the reward.

    Raises:
        RewardError: It is not there.
    """
    if name not in columns:
        raise RewardError(
            f"reward {reward} reads the column {name!r}, and the data has {sorted(columns.keys() - ARGUMENTS)}: name "
            "the column that holds it, or add it to the rows."
        )
    return columns[name]


def place_of(places: Sequence[str] | None, index: int) -> str:
    """Return where a completion's prompt came from, for messages.

    Args:
        places: One per completion, or None.
        index: Of the completion.
    """
    return f"completion {index}" if places is None or not 0 <= index < len(places) else str(places[index])
