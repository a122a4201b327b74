"""From what became of calls to scores: what failed is counted, never taken for a verdict in silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from falign.errors import RewardError
from falign.raised import raised_message
from falign.rewards.base import Scores, check_rewards, place_of
from falign.rewards.child import Outcome

__all__ = ["row_error", "scores_of"]

ROW_ERROR = "RowError"  # of falign.rewards.verifiers, by its name in another process


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
        name: What messages call the reward.
        failed: What a call is worth that timed out or raised.
        stop_on_errors: Whether an exception stops the run instead of being counted. Timeouts are always counted.
        places: Where the prompts came from, for messages.
        completions: Their texts, for messages.
        value: What makes a value of what a call returned, given its place.
        hint: What makes a further sentence of an exception's class and message.

    Raises:
        RewardError: An exception that stops, a row that cannot be judged at all, or a value that is no reward.
    """
    values: list[Any] = []
    messages: list[str] = []
    for i, outcome in enumerate(outcomes):
        where = f"reward {name}, {place_of(places, i)}"
        if (reason := row_error(outcome)) is not None:
            raise RewardError(f"{where}: {reason}. Mend the row, or remove it.")
        text = None if completions is None or outcome.kind != "error" else completions[i]
        lines = outcome.lines if outcome.kind == "error" else ()
        told = raised_message(f"{where}: {outcome.message}", lines, text)
        if outcome.kind == "error" and stop_on_errors:
            raise RewardError(f"{told}\nMend the function.{hint(outcome.message)}")
        if outcome.kind == "value":
            values.append(value(outcome.value, where))
        else:
            values.append(failed)
            messages.append(told)
    timeouts = sum(outcome.kind == "timeout" for outcome in outcomes)
    checked = check_rewards(values, len(outcomes), name=name, places=places)
    return Scores(checked, timeouts, len(messages) - timeouts, messages[0] if messages else "")
