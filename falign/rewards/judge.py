"""An LLM judge as a reward (scores of completions) and as a preference oracle (pairs in both orders)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from falign.errors import RewardError
from falign.judges import ChoiceForm, Compared, Judge, Judgment, ScoreForm, compare, conversation_text
from falign.rewards.base import ARGUMENTS, Scores, column, place_of
from falign.rewards.identity import Identity
from falign.rewards.oracle import Preferences

__all__ = ["JudgeOracle", "JudgeReward", "reference_block"]

OF_ALL = ("prompt", "reference", "form")
"""Placeholders of every template; further ones are columns of the data."""


def reference_block(answer: Any) -> str:
    r"""Return the part of a prompt with a reference answer; ``""`` without one.

    Example:
        >>> reference_block("42")
        '[Beginning of a reference answer]\n42\n[End of the reference answer]\n\n'
    """
    if answer is None:
        return ""
    return f"[Beginning of a reference answer]\n{answer}\n[End of the reference answer]\n\n"


@dataclass(frozen=True)
class _Questions:
    """The placeholders of questions about completions, filled from prompts and columns.

    Attributes:
        judge: The judge, with its template.
        reference: The column with reference answers, if any.
        own: Placeholders that are filled for each question.
    """

    judge: Judge
    reference: str | None
    own: tuple[str, ...]

    def check(self, prompts: Sequence[Any], columns: Mapping[str, list[Any]]) -> list[str | None]:
        """Check the template and the columns, and return for each row why it cannot be judged.

        Raises:
            ConfigError: A placeholder is unknown, or a required one is missing.
            RewardError: The column of reference answers does not exist.
        """
        template = self.judge.template
        known = {*OF_ALL, *self.own, *(columns.keys() - ARGUMENTS)}
        template.check(known, required=self.own)
        shown = [name for name in template.placeholders if name not in (*OF_ALL, *self.own)]
        if self.reference is not None:
            column(columns, self.reference, reward="judge")
            shown.append(self.reference)
        missing = [[name for name in shown if columns[name][i] is None] for i in range(len(prompts))]
        return [f"the column {names[0]!r}, which the judge reads, is missing" if names else None for names in missing]

    def fields(self, prompt: Any, i: int, columns: Mapping[str, list[Any]], **own: str) -> dict[str, Any]:
        """Return the placeholders of a question about the completions of a row."""
        read = {name: columns[name][i] for name in self.judge.template.placeholders if name in columns}
        block = None if self.reference is None else column(columns, self.reference, reward="judge")[i]
        return {**read, "prompt": conversation_text(prompt), "reference": reference_block(block), **own}


def _measured(judge: Judge, judgments: Sequence[Judgment]) -> dict[str, list[float]]:
    """Return tokens and, with prices, the cost of each judgment."""
    tokens = [(each.prompt_tokens, each.completion_tokens) for each in judgments]
    costs = [judge.endpoint.cost(*each) for each in tokens]
    found = {"tokens": [float(sum(each)) for each in tokens]}
    return found | {"cost": [cost for cost in costs if cost is not None]} if None not in costs else found


def _message(problem: str, where: str) -> str:
    return f"{where}: the judge gives no verdict: {problem}" if problem else ""


@dataclass(frozen=True)
class JudgeReward:
    """Scores of completions on a scale.

    A completion without a verdict is counted as an error. It has no value, unless :attr:`failed` gives it one.

    Attributes:
        judge: A judge whose form is a score, and whose template has ``{completion}``.
        reference: Column with a reference answer, shown at ``{reference}``.
        failed: Value of a completion without a verdict; None leaves it out.
        name: Its name in messages.

    Raises:
        RewardError: The judge gives no scores.
    """

    judge: Judge
    reference: str | None = None
    failed: float | None = None
    name: str = "judge"

    def __post_init__(self) -> None:
        if not isinstance(self.judge.form, ScoreForm):
            raise RewardError(f"reward {self.name}: its judge gives no scores; make it with a ScoreForm.")

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        return self.score(prompts, completions, **columns).values

    def score(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> Scores:
        """Return the scores, and the number of completions without one.

        Args:
            prompts: Their prompts.
            completions: Their texts.
            columns: One value per completion.

        Raises:
            JudgeError: The judge cannot be asked, or its budget is spent.
        """
        questions = self._questions
        judgments = self.judge.ask(
            [
                questions.fields(prompt, i, columns, completion=text)
                for i, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
            ]
        )
        failed = [i for i, each in enumerate(judgments) if each.value is None]
        return Scores(
            [self.failed if each.value is None else each.value for each in judgments],
            errors=len(failed),
            message=self._message(judgments[failed[0]].problem, columns, failed[0]) if failed else "",
            measured=_measured(self.judge, judgments),
        )

    def row_errors(self, prompts: list[Any], **columns: list[Any]) -> list[str | None]:
        """Check the template and the service, and return which rows lack a column that the judge reads.

        Raises:
            ConfigError: A placeholder of the template is unknown or missing.
            JudgeError: The service is unreachable, or does not have the model.
        """
        found = self._questions.check(prompts, columns)
        self.judge.served()
        return found

    def identity(self) -> Identity:
        """Return what the judge is asked, and the value of a failure."""
        settings = {"judge": self.judge.identity(), "reference": self.reference, "failed": self.failed}
        return Identity(__name__, settings)

    @property
    def _questions(self) -> _Questions:
        return _Questions(self.judge, self.reference, ("completion",))

    def _message(self, problem: str, columns: Mapping[str, list[Any]], i: int) -> str:
        remedy = "; set failed to give such a completion a value" if self.failed is None else ""
        return _message(problem + remedy, place_of(columns.get("place"), i))


@dataclass(frozen=True)
class JudgeOracle:
    """A preference oracle (:class:`falign.rewards.PreferenceOracle`) that is an LLM judge.

    Attributes:
        judge: A judge whose form is a choice, and whose template has ``{first}`` and ``{second}``.
        both_orders: Ask for both orders of a pair; if they disagree, it is a tie. False asks once.
        reference: Column with a reference answer, shown at ``{reference}``.

    Raises:
        RewardError: The judge does not choose.
    """

    judge: Judge
    both_orders: bool = True
    reference: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.judge.form, ChoiceForm):
            raise RewardError("the oracle's judge does not choose between answers; make it with the form PAIR or FIVE.")

    def __call__(
        self, prompts: list[Any], first: list[str], second: list[str], **columns: list[Any]
    ) -> list[float | None]:
        return self.preferences(prompts, first, second, **columns).values

    def preferences(self, prompts: list[Any], first: list[str], second: list[str], **columns: list[Any]) -> Preferences:
        """Return 1, 1/2 or 0 for each pair; None without a verdict.

        ``position_bias``, ``tie`` and ``failure`` are logged as shares of the pairs, ``tokens`` and ``cost`` as
        means over questions.

        Args:
            prompts: The prompt of each pair.
            first: Its first completion.
            second: Its second completion.
            columns: One value per pair.

        Raises:
            JudgeError: The judge cannot be asked, or its budget is spent.
        """
        questions = _Questions(self.judge, self.reference, ("first", "second"))
        pairs = [
            (
                questions.fields(prompt, i, columns, first=a, second=b),
                questions.fields(prompt, i, columns, first=b, second=a),
            )
            for i, (prompt, a, b) in enumerate(zip(prompts, first, second, strict=True))
        ]
        found = compare(self.judge, pairs) if self.both_orders else self._once([pair[0] for pair in pairs])
        asked = [each.forward for each in found] + [each.backward for each in found if self.both_orders]
        values = [each.outcome for each in found]
        judged = [each for each in found if each.outcome is not None]
        measured = {
            "tie": [float(each.outcome == 0.5) for each in judged],
            "failure": [float(value is None) for value in values],
            **_measured(self.judge, asked),
        }
        if self.both_orders:
            # A winner that changes with the order: one outcome is 1, the other 0.
            measured["position_bias"] = [float({*each.outcomes} == {0.0, 1.0}) for each in judged]
        failed = values.index(None) if None in values else None
        message = "" if failed is None else _message(found[failed].problem, place_of(columns.get("place"), failed))
        return Preferences(values, message, {name: each for name, each in measured.items() if each})

    def row_errors(self, prompts: list[Any], **columns: list[Any]) -> list[str | None]:
        """Check as :meth:`JudgeReward.row_errors` does."""
        found = _Questions(self.judge, self.reference, ("first", "second")).check(prompts, columns)
        self.judge.served()
        return found

    def identity(self) -> Identity:
        """Return what the judge is asked, and in which orders."""
        settings = {"judge": self.judge.identity(), "both_orders": self.both_orders, "reference": self.reference}
        return Identity(__name__, settings)

    def _once(self, questions: Sequence[Mapping[str, Any]]) -> list[Compared]:
        form = self.judge.form
        assert isinstance(form, ChoiceForm)
        judgments = self.judge.ask(questions)
        outcomes = [None if each.value is None else form.outcomes[each.value] for each in judgments]
        return [Compared(each, each, (value, value)) for each, value in zip(judgments, outcomes, strict=True)]
