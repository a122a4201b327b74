"""Pairs judged in both orders, and what the position of an answer did to the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from falign.judges.judge import Judge, Judgment
from falign.judges.verdicts import ChoiceForm

__all__ = ["Compared", "PositionCounts", "compare", "position_counts"]


class Compared(NamedTuple):
    """Two answers, judged in both orders.

    Attributes:
        forward: The judgment with the first answer as A.
        backward: The judgment with the second answer as A.
        outcomes: The outcome for the first answer in either order: 1 won, 1/2 tied, 0 lost; None at a failure.
    """

    forward: Judgment
    backward: Judgment
    outcomes: tuple[float | None, float | None]

    @property
    def outcome(self) -> float | None:
        """The outcome for the first answer: that of both orders if they agree, else a tie; None if one failed."""
        first, second = self.outcomes
        if first is None or second is None:
            return None
        return first if first == second else 0.5

    @property
    def problem(self) -> str:
        """Why there is no outcome; ``""`` if there is one."""
        return self.forward.problem or self.backward.problem


class PositionCounts(NamedTuple):
    """Numbers of pairs by the effect of the order.

    Attributes:
        consistent: Both orders have the same outcome.
        first: In both orders the answer in the first place won.
        second: In both orders the answer in the second place won.
        partial: One order has a winner, the other is a tie.
        failed: An order has no verdict.
    """

    consistent: int = 0
    first: int = 0
    second: int = 0
    partial: int = 0
    failed: int = 0

    @property
    def judged(self) -> int:
        """Number of pairs with an outcome."""
        return self.consistent + self.first + self.second + self.partial

    @property
    def bias(self) -> float | None:
        """The position-bias rate: the share of the judged pairs whose winner changes with the order."""
        return (self.first + self.second) / self.judged if self.judged else None


def compare(judge: Judge, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Compared]:
    """Ask for the verdict of each pair in both orders.

    Args:
        judge: Its form is a :class:`ChoiceForm`.
        pairs: Of each pair the placeholders with the first answer as A, and with the second answer as A.

    Raises:
        JudgeError: As for :meth:`Judge.ask`.
    """
    form = judge.form
    assert isinstance(form, ChoiceForm), "a judge of pairs has a form with outcomes"
    judgments = judge.ask([question for pair in pairs for question in pair])
    found = []
    for forward, backward in zip(judgments[::2], judgments[1::2], strict=True):
        first = None if forward.value is None else form.outcomes[forward.value]
        second = None if backward.value is None else 1 - form.outcomes[backward.value]
        found.append(Compared(forward, backward, (first, second)))
    return found


def position_counts(compared: Sequence[Compared]) -> PositionCounts:
    """Count the pairs by the effect of the order."""
    names = [_effect(each) for each in compared]
    return PositionCounts(*(names.count(name) for name in PositionCounts._fields))


def _effect(compared: Compared) -> str:
    first, second = compared.outcomes
    if first is None or second is None:
        return "failed"
    if first == second:
        return "consistent"
    if 0.5 in (first, second):
        return "partial"
    return "first" if first == 1.0 else "second"
