"""Judged benchmarks: their questions, their files of answers, and what a judge is shown."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from typing_extensions import override

from falign.choices import shown
from falign.data import Row, read_rows
from falign.errors import ConfigError, DataError
from falign.judges import COMPARE, COMPARE_FIVE, FIVE, PAIR, ChoiceForm, JudgeTemplate
from falign.registry import Registry

__all__ = ["BENCHMARKS", "AlpacaEval", "Answers", "ArenaHard", "JudgedBenchmark", "JudgedItem", "MTBench", "digest"]


@dataclass(frozen=True)
class JudgedItem:
    """A question of one or more turns.

    Attributes:
        id: The benchmark's own id; unique.
        place: The row of the file, for messages.
        turns: The user's turns, in order.
        category: Its category; ``""`` without categories.
        references: A reference answer for each turn; empty without.
        row: The row as it is.
    """

    id: str
    place: str
    turns: tuple[str, ...]
    category: str = ""
    references: tuple[str, ...] = ()
    row: Mapping[str, Any] | None = None


class Answers(NamedTuple):
    """The answers of one model.

    Attributes:
        model: Its name.
        turns: By the id of the question, the answer to each turn.
    """

    model: str
    turns: Mapping[str, tuple[str, ...]]

    def digest(self, questions: Sequence[JudgedItem]) -> str:
        """Return the SHA-256 of the answers to some questions."""
        return digest([[each.id, self.turns[each.id]] for each in questions])

    def require_all(self, questions: Sequence[JudgedItem], place: str) -> None:
        """Refuse answers that lack a question or a turn.

        Raises:
            DataError: The message has the first question without an answer.
        """
        for question in questions:
            found = len(self.turns.get(question.id, ()))
            if found != len(question.turns):
                raise DataError(
                    f"{place}: question {question.id!r} has {len(question.turns)} turns, and {found} answers here: "
                    "give the answers to all questions, or lower `limit`."
                )


class JudgedBenchmark(ABC):
    """A benchmark whose answers an LLM judge scores or compares; one of your own subclasses it.

    Attributes:
        name: Its name in falign.
        modes: ``single`` (scores from 1 to 10), ``pairwise`` (against the baseline's answers); the first is the
            default.
        answers_file: Name of the file of answers.
        form: The form of a verdict on a pair.
        pair_template: The messages for a pair.
        strong_weight: How often a verdict "much better" counts; None to take both orders of a pair as one verdict, a
            tie where they disagree. With a number, each order counts by itself.
    """

    name: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = ("pairwise",)
    answers_file: ClassVar[str] = "answers.jsonl"
    form: ClassVar[ChoiceForm] = PAIR
    pair_template: ClassVar[JudgeTemplate] = COMPARE
    strong_weight: ClassVar[int | None] = None

    @abstractmethod
    def question(self, row: Row) -> JudgedItem:
        """Return the question of a row.

        Raises:
            DataError: The row has another form.
        """

    @abstractmethod
    def answer_row(self, question: JudgedItem, turns: Sequence[str], *, model: str) -> dict[str, Any]:
        """Return the answers to a question as the benchmark's own programs read them."""

    @abstractmethod
    def answer(self, row: Row) -> tuple[str, str, tuple[str, ...]]:
        """Return the id of the question, the model, and the answers of a row of such a file.

        Raises:
            DataError: The row has another form.
        """

    def temperature(self, question: JudgedItem) -> float:
        """Return the temperature at which the benchmark samples an answer."""
        return 0.0

    def own_baseline(self, questions: Sequence[JudgedItem]) -> Answers | None:
        """Return the baseline's answers that the file of questions has; None if it has none."""
        return None

    def file_text(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a file of answers."""
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def read_questions(self, path: str | Path, *, limit: int | None = None) -> list[JudgedItem]:
        """Return the questions of a file.

        Raises:
            DataError: The file is missing, a row has another form, or an id comes twice.
        """
        found: dict[str, JudgedItem] = {}
        for row in read_rows(path):
            if limit is not None and len(found) == limit:
                break
            question = self.question(row)
            if question.id in found:
                raise DataError(
                    f"{row.place}: the question {question.id!r} came before, at {found[question.id].place}."
                )
            found[question.id] = question
        if not found:
            raise DataError(f"{path} has no questions.")
        return [*found.values()]

    def read_answers(self, path: str | Path) -> Answers:
        """Return the answers of a file.

        Raises:
            DataError: The file is missing, a row has another form, a question is answered twice, or several models
                answered.
        """
        turns: dict[str, tuple[str, ...]] = {}
        models: dict[str, str] = {}
        for row in read_rows(path):
            key, model, texts = self.answer(row)
            if key in turns:
                raise DataError(
                    f"{row.place}: the question {key!r} has been answered before: keep one answer for each."
                )
            turns[key] = texts
            models.setdefault(model, row.place)
        if len(models) != 1:
            several = " and ".join(f"{model!r} ({place})" for model, place in list(models.items())[:2])
            raise DataError(f"{path} has answers of {several or 'no model'}: give the answers of one.")
        return Answers(next(iter(models)), turns)

    def _text(self, row: Row, *names: str) -> str:
        value: Any = row.fields.get(names[0])
        for name in names[1:]:
            value = value.get(name) if isinstance(value, Mapping) else None
        if not isinstance(value, str):
            raise DataError(
                f"{row.place}: {'.'.join(names)} is {shown(value)}, and {self.name} needs a text there; the row has "
                f"{sorted(row.fields)}."
            )
        return value

    def _id(self, row: Row) -> str:
        found = [row.fields[name] for name in ("question_id", "uid") if name in row.fields]
        if not found or not isinstance(found[0], str | int):
            raise DataError(f"{row.place}: there is no question_id or uid; the row has {sorted(row.fields)}.")
        return str(found[0])

    def _turns(self, row: Row) -> tuple[str, ...]:
        """Return the answers of a row: of ``choices``, of ``messages``, or one ``answer``."""
        fields = row.fields
        try:
            if "choices" in fields:
                values = fields["choices"][0]["turns"]
            elif "messages" in fields:
                values = [each["content"] for each in fields["messages"] if each["role"] == "assistant"]
            else:
                values = [fields["answer"]]
            texts = tuple(_plain(value) for value in values)
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"{row.place} has no answer: give choices[0].turns, messages with an assistant's turn, or answer; it "
                f"has {sorted(fields)}."
            ) from error
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{row.place}: an answer is not text: {shown(texts)}.")
        return texts


def _plain(value: Any) -> Any:
    """Return the text of an answer that is a mapping with its text."""
    if not isinstance(value, Mapping):
        return value
    return value["answer"] if "answer" in value else value["content"]


def digest(value: Any) -> str:
    """Return the SHA-256 of a value that JSON has."""
    return hashlib.sha256(json.dumps(value).encode("utf-8", "surrogatepass")).hexdigest()


def _answer_id(*parts: str) -> str:
    return digest(parts)[:22]


class MTBench(JudgedBenchmark):
    """MT-Bench: questions of two turns, scored from 1 to 10, or compared with a baseline's answers.

    Source:
        Zheng et al. (arXiv:2306.05685); the files are those of FastChat's ``llm_judge``.
    """

    name = "mt_bench"
    modes = ("single", "pairwise")
    # FastChat's temperatures by category; its other categories have 0.7.
    _temperatures: ClassVar[Mapping[str, float]] = {
        "writing": 0.7,
        "roleplay": 0.7,
        "extraction": 0.0,
        "math": 0.0,
        "coding": 0.0,
        "reasoning": 0.0,
        "stem": 0.1,
        "humanities": 0.1,
    }

    @override
    def question(self, row: Row) -> JudgedItem:
        turns, references = row.fields.get("turns"), row.fields.get("reference") or ()
        if not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise DataError(f"{row.place}: turns is {shown(turns)}; it must be a list of the user's turns.")
        known = tuple(map(str, references)) if len(references) == len(turns) else ()
        return JudgedItem(
            self._id(row), row.place, tuple(turns), str(row.fields.get("category", "")), known, row.fields
        )

    @override
    def temperature(self, question: JudgedItem) -> float:
        return self._temperatures.get(question.category, 0.7)

    @override
    def answer_row(self, question: JudgedItem, turns: Sequence[str], *, model: str) -> dict[str, Any]:
        assert question.row is not None
        return {
            "question_id": question.row["question_id"],
            "answer_id": _answer_id(model, question.id, *turns),
            "model_id": model,
            "choices": [{"index": 0, "turns": list(turns)}],
            "tstamp": time.time(),
        }

    @override
    def answer(self, row: Row) -> tuple[str, str, tuple[str, ...]]:
        return self._id(row), self._text(row, "model_id"), self._turns(row)


class ArenaHard(JudgedBenchmark):
    """Arena-Hard: one turn, five verdicts against a baseline's answers, each order a game of its own.

    A verdict "much better" counts three times, as in its ``show_result.py``.

    Source:
        Li et al. (arXiv:2406.11939); the files are those of ``arena-hard-auto``.
    """

    name = "arena_hard"
    form = FIVE
    pair_template = COMPARE_FIVE
    strong_weight = 3

    @override
    def question(self, row: Row) -> JudgedItem:
        if "prompt" in row.fields:
            prompt = self._text(row, "prompt")
        else:  # v0.1 as first published
            turns: Any = row.fields.get("turns")
            prompt = (
                turns[0].get("content") if isinstance(turns, list) and turns and isinstance(turns[0], dict) else None
            )
            if not isinstance(prompt, str):
                raise DataError(f"{row.place}: there is no prompt; the row has {sorted(row.fields)}.")
        return JudgedItem(self._id(row), row.place, (prompt,), str(row.fields.get("category", "")), (), row.fields)

    @override
    def answer_row(self, question: JudgedItem, turns: Sequence[str], *, model: str) -> dict[str, Any]:
        messages = [
            {"role": "user", "content": question.turns[0]},
            {"role": "assistant", "content": {"answer": turns[0]}},
        ]
        return {
            "uid": question.id,
            "ans_id": _answer_id(model, question.id, *turns),
            "model": model,
            "messages": messages,
            "tstamp": time.time(),
        }

    @override
    def answer(self, row: Row) -> tuple[str, str, tuple[str, ...]]:
        return self._id(row), self._text(row, "model" if "model" in row.fields else "model_id"), self._turns(row)


class AlpacaEval(JudgedBenchmark):
    """Files in AlpacaEval's format: instructions with reference outputs, against which answers are compared.

    The id of a question is its instruction, as AlpacaEval joins outputs.

    Source:
        The format of ``alpaca_eval`` (https://github.com/tatsu-lab/alpaca_eval); no file of theirs comes with falign.
    """

    name = "alpaca_eval"
    answers_file = "outputs.json"

    @override
    def question(self, row: Row) -> JudgedItem:
        text = self._text(row, "instruction")
        return JudgedItem(text, row.place, (text,), str(row.fields.get("dataset", "")), (), row.fields)

    @override
    def answer_row(self, question: JudgedItem, turns: Sequence[str], *, model: str) -> dict[str, Any]:
        kept = {name: question.row[name] for name in ("dataset", "datasplit") if question.row and name in question.row}
        return {**kept, "instruction": question.id, "output": turns[0], "generator": model}

    @override
    def answer(self, row: Row) -> tuple[str, str, tuple[str, ...]]:
        return self._text(row, "instruction"), self._text(row, "generator"), (self._text(row, "output"),)

    @override
    def own_baseline(self, questions: Sequence[JudgedItem]) -> Answers | None:
        rows = [Row(each.place, dict(each.row or {})) for each in questions]
        if not all({"output", "generator"} <= row.fields.keys() for row in rows):
            return None
        found = [self.answer(row) for row in rows]
        models = sorted({model for _, model, _ in found})
        if len(models) != 1:
            raise ConfigError(
                f"the reference outputs are of {' and '.join(models[:2])}: give `baseline`, a file of one."
            )
        return Answers(models[0], {key: turns for key, _, turns in found})

    @override
    def file_text(self, rows: Sequence[Mapping[str, Any]]) -> str:
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


BENCHMARKS: Registry[type[JudgedBenchmark]] = Registry(
    "judged benchmark",
    {"mt_bench": MTBench, "arena_hard": ArenaHard, "alpaca_eval": AlpacaEval},
    wanted="subclass of falign.evaluation.judged.JudgedBenchmark",
    is_member=lambda value: isinstance(value, type) and issubclass(value, JudgedBenchmark),
)
"""The judged benchmarks, by name."""
