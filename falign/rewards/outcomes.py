"""Scores from the outcomes of calls; failed calls are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from falign.errors import RewardError
from falign.raised import raised_message
from falign.rewards.base import Scores, check_rewards, place_of
from falign.rewards.child import Outcome

__all__ = ["row_error", "scores_of"]

ROW_ERROR = "RowError"  # of falign.rewards.verifiers; other processes report classes by name


def row_error(outcome: Outcome) -> str | None:
    """Return why a row cannot be judged; None if the outcome is not such an error."""
    return outcome.message.partition(": ")[2] if outcome.error == ROW_ERROR else None


def scores_of(
    outcomes: Sequence[Outcome],
    *,
    name: str,
    failed: float | None,
    stop_on_errors: bool = False,
    places: Sequence[str] | None = None,
    completions: Sequence[str] | None = None,
    value: Callable[[Any, str], Any] = lambda value, where: value,
    hint: Callable[[str], str] = lambda raised: "",
) -> Scores:
    """Return values and counts.

    Args:
        outcomes: One per completion.
        name: The reward's name in messages.
        failed: Value of a call that timed out or raised.
        stop_on_errors: Whether an exception stops the run instead of being counted. Timeouts are always counted.
        places: Places of the prompts, for messages.
        completions: Their texts, for messages.
        value: Maps the result of a call and its place to a value.
        hint: Maps an exception's class and message to a further sentence.

    Raises:
        RewardError: An exception stops the run, a row cannot be judged, or a value is invalid.
    """
    values: list[Any] = []
    messages: list[str] = []
    for i, outcome in enumerate(outcomes):
        where = f"reward {name}, {place_of(places, i)}"
        if (reason := row_error(outcome)) is not None:
            raise RewardError(f"{where}: {reason}. Fix the row, or remove it.")
        text = None if completions is None or outcome.kind != "error" else completions[i]
        lines = outcome.lines if outcome.kind == "error" else ()
        told = raised_message(f"{where}: {outcome.message}", lines, text)
        if outcome.kind == "error" and stop_on_errors:
            raise RewardError(f"{told}\nFix the function.{hint(outcome.message)}")
        if outcome.kind == "value":
            values.append(value(outcome.value, where))
        else:
            values.append(failed)
            messages.append(told)
    timeouts = sum(outcome.kind == "timeout" for outcome in outcomes)
    checked = check_rewards(values, len(outcomes), name=name, places=places)
    return Scores(checked, timeouts, len(messages) - timeouts, messages[0] if messages else "")
