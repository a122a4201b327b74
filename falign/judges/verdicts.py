"""Forms of verdicts: their JSON schema, their description in a prompt, and the rule by which an answer is read."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from typing_extensions import override

from falign.choices import shown

__all__ = ["FIVE", "PAIR", "ChoiceForm", "MalformedError", "ScoreForm", "VerdictForm"]

_MARK = re.compile(r"\[\[(.+?)\]\]", re.DOTALL)
_THOUGHT_END = "</think>"
_MOST_VALUES = 1001


class MalformedError(ValueError):
    """An answer without a verdict of the form."""


class VerdictForm(ABC):
    """The form of a judge's verdict.

    An answer is read by this rule, whether or not the service was given the schema. What precedes the last
    ``</think>`` does not count. The verdict is the key :attr:`key` of the last JSON object that has it; without such an
    object, the content of the last double brackets, ``[[...]]``. If that value is not of the form, or there is neither,
    the answer is malformed; an earlier value is not taken in its place.

    Attributes:
        key: The key of the verdict in JSON.
    """

    key: ClassVar[str]

    @abstractmethod
    def value(self, given: Any) -> Any:
        """Return a verdict from its JSON value or its text.

        Raises:
            MalformedError: It is not of the form.
        """

    @abstractmethod
    def value_schema(self) -> dict[str, Any]:
        """Return the JSON schema of a verdict."""

    @abstractmethod
    def values_text(self) -> str:
        """Return the possible verdicts in words."""

    def schema(self) -> dict[str, Any]:
        """Return the named JSON schema of an answer, for ``response_format``."""
        properties = {"reason": {"type": "string"}, self.key: self.value_schema()}
        schema = {
            "type": "object",
            "properties": properties,
            "required": [*properties],
            "additionalProperties": False,
        }
        return {"name": "judgment", "strict": True, "schema": schema}

    def instruction(self) -> str:
        """Return the sentence that asks for the form, which a template places by ``{form}``."""
        return (
            f'Answer with one JSON object and nothing else: {{"reason": "...", "{self.key}": ...}}. Give the reason '
            f"first, in one to three sentences; {self.key} is {self.values_text()}."
        )

    def read(self, answer: str) -> Any:
        """Return the verdict of an answer.

        Raises:
            MalformedError: It has none; the message has the reason.
        """
        text = answer.rpartition(_THOUGHT_END)[2]
        found = [each for each in _objects(text) if self.key in each]
        if found:
            return self.value(found[-1][self.key])
        if marks := _MARK.findall(text):
            return self.value(marks[-1].strip())
        if not text.strip():
            raise MalformedError("it is empty")
        raise MalformedError(f"it has no JSON object with {self.key!r}, and nothing in double brackets")


@dataclass(frozen=True)
class ScoreForm(VerdictForm):
    """A score on a scale. The schema has its whole numbers; other numbers between its ends are read, too.

    Attributes:
        low: The worst score.
        high: The best score.

    Raises:
        ValueError: The scale is empty or too long.

    Example:
        >>> ScoreForm(1, 10).read('The answer is clear. {"reason": "clear", "score": 8}')
        8.0
        >>> ScoreForm(1, 10).read("I compared [[3]] and say: [[7]]")
        7.0
    """

    low: int = 1
    high: int = 10
    key: ClassVar[str] = "score"

    def __post_init__(self) -> None:
        if not self.low < self.high < self.low + _MOST_VALUES:
            raise ValueError(
                f"scale=[{self.low}, {self.high}]: give the worst and the best score, at most {_MOST_VALUES - 1} apart."
            )

    @override
    def value(self, given: Any) -> float:
        try:
            number = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not self.low <= number <= self.high:
            raise MalformedError(f"the score is {shown(given)}, which is not a number from {self.low} to {self.high}")
        return number

    @override
    def value_schema(self) -> dict[str, Any]:
        # Some services refuse minimum and maximum in strict schemas; all of them know enum.
        return {"type": "integer", "enum": [*range(self.low, self.high + 1)]}

    @override
    def values_text(self) -> str:
        return f"a whole number from {self.low} (worst) to {self.high} (best)"


@dataclass(frozen=True)
class ChoiceForm(VerdictForm):
    """One of some words.

    Attributes:
        outcomes: Each verdict with its outcome for the first of two answers: 1 won, 1/2 tied, 0 lost.
        aliases: Other spellings, each with its verdict.
        strong: Verdicts that say "much better".
        text: The verdicts in words.

    Example:
        >>> PAIR.read('{"verdict": "B"}'), PAIR.read("[[C]]"), FIVE.read("My final verdict is: [[A>>B]]")
        ('B', 'tie', 'A>>B')
    """

    outcomes: Mapping[str, float]
    aliases: Mapping[str, str] = field(default_factory=dict)
    strong: frozenset[str] = frozenset()
    text: str = ""
    key: ClassVar[str] = "verdict"

    @override
    def value(self, given: Any) -> str:
        name = self.aliases.get(given, given) if isinstance(given, str) else None
        if name is None or name not in self.outcomes:
            raise MalformedError(f"the verdict is {shown(given)}, which is not one of {', '.join(self.outcomes)}")
        return name

    @override
    def value_schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": [*self.outcomes]}

    @override
    def values_text(self) -> str:
        return self.text


PAIR = ChoiceForm(
    {"A": 1.0, "B": 0.0, "tie": 0.5},
    {"C": "tie", "Tie": "tie"},
    text='"A" if the answer of A is better, "B" if the answer of B is better, "tie" if they are equally good',
)
"""A, B or a tie."""

FIVE = ChoiceForm(
    {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0},
    {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"},
    frozenset({"A>>B", "B>>A"}),
    '"A>>B" if the answer of A is much better, "A>B" if it is better, "A=B" if they are equally good, "B>A" if the '
    'answer of B is better, "B>>A" if it is much better',
)
"""The five verdicts of Arena-Hard."""


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the outermost JSON objects of a text, in order."""
    found: list[dict[str, Any]] = []
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            value, end = None, start + 1
        if isinstance(value, dict):
            found.append(value)
        start = text.find("{", end)
    return found
