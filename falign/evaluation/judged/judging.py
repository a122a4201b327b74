"""The judge's verdicts on answers, question after question, with a journal; and their statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter
from rich.console import Console

from falign.evaluation.judged.benchmarks import Answers, JudgedBenchmark, JudgedItem
from falign.judges import Compared, Judge, Judgment, compare, position_counts
from falign.metrics.intervals import bootstrap
from falign.rewards.judge import reference_block
from falign.rollouts.journal import Journal
from falign.terminal import progress

__all__ = ["JudgedRow", "JudgedTask", "judged_metrics", "judged_rows"]

QUESTIONS_PER_CALL = 16
Metric = Mapping[str, float | None]


class JudgedRow(NamedTuple):
    """The verdict on the answer to one turn.

    Attributes:
        question_id: The question.
        category: Its category.
        turn: Number of the turn, from 1.
        value: The score, or the outcome for the model: 1 won, 1/2 tied, 0 lost; None without a verdict.
        verdicts: The verdict of each request; of a pair, first with the model's answer as A.
        judgments: The judge's answers.
        problem: Why there is no verdict.
        lengths: Characters of the model's answer, and of the baseline's.
        judge: The model that the service names in its answers.
    """

    question_id: str
    category: str
    turn: int
    value: float | None
    verdicts: list[Any]
    judgments: list[str]
    problem: str
    lengths: list[int]
    judge: str


_ROWS = TypeAdapter(list[JudgedRow])


class JudgedTask(NamedTuple):
    """The material of a judgment.

    Attributes:
        benchmark: The benchmark.
        questions: Its questions.
        answers: The answers of the model.
        baseline: The answers to compare them with; None to score each by itself.
        references: Reference answers by question and turn.
    """

    benchmark: JudgedBenchmark
    questions: Sequence[JudgedItem]
    answers: Answers
    baseline: Answers | None
    references: Mapping[str, tuple[str, ...]]


def judged_rows(
    task: JudgedTask, judge: Judge, journal: Path, *, record: Mapping[str, Any], overwrite: bool, console: Console
) -> list[JudgedRow]:
    """Return a row for each turn of each question; a stopped call continues if repeated.

    Args:
        task: What is judged.
        judge: The judge, with the template and the form of the task.
        journal: File of the rows so far.
        record: Everything that the rows depend on.
        overwrite: Whether a journal with other inputs is dropped.
        console: Shows progress.

    Raises:
        ConfigError: The journal has other inputs.
        JudgeError: The judge cannot be asked, or its budget is spent; the rows so far stay.
    """
    kept: Journal[list[JudgedRow]] = Journal(
        journal,
        _ROWS.validate_python,
        record=record,
        chunk_size=1,  # a question's rows are complete by themselves
        total=len(task.questions),
        work="judging",
        overwrite=overwrite,
        plain=lambda rows: [list(row) for row in rows],
    )
    if kept.entries:
        judge.require_version(kept.entries[0][0].judge)
    with progress(console, "questions judged", total=len(task.questions), done=len(kept.entries)) as show:
        for start in range(len(kept.entries), len(task.questions), QUESTIONS_PER_CALL):
            chunk = task.questions[start : start + QUESTIONS_PER_CALL]
            turns = [(question, turn) for question in chunk for turn in range(len(question.turns))]
            rows = _scored(task, judge, turns) if task.baseline is None else _compared(task, judge, turns)
            by_question: dict[str, list[JudgedRow]] = {question.id: [] for question in chunk}
            for row in rows:
                by_question[row.question_id].append(row)
            kept.extend([[row._replace(judge=judge.answers_as) for row in rows] for rows in by_question.values()])
            show(len(kept.entries))
    return [row for rows in kept.entries for row in rows]


def _scored(task: JudgedTask, judge: Judge, turns: Sequence[tuple[JudgedItem, int]]) -> list[JudgedRow]:
    fields = []
    for question, turn in turns:
        own = task.answers.turns[question.id]
        before = [
            f"User: {text}\n\nAssistant: {answer}\n\n" for text, answer in zip(question.turns[:turn], own, strict=False)
        ]
        prompt = "".join(before) + ("User: " if before else "") + question.turns[turn]
        fields.append({"prompt": prompt, "completion": own[turn], "reference": _reference(task, question, turn)})
    return [
        _row(question, turn, [judgment], judgment.value, [len(task.answers.turns[question.id][turn])])
        for (question, turn), judgment in zip(turns, judge.ask(fields), strict=True)
    ]


def _compared(task: JudgedTask, judge: Judge, turns: Sequence[tuple[JudgedItem, int]]) -> list[JudgedRow]:
    assert task.baseline is not None
    pairs = []
    for question, turn in turns:
        own, other = (_answers_text(each.turns[question.id], turn) for each in (task.answers, task.baseline))
        shown = {"prompt": _questions_text(question, turn), "reference": _reference(task, question, turn)}
        pairs.append(({**shown, "first": own, "second": other}, {**shown, "first": other, "second": own}))
    found: list[Compared] = compare(judge, pairs)
    return [
        _row(
            question,
            turn,
            [each.forward, each.backward],
            each.outcome,
            [len(answers.turns[question.id][turn]) for answers in (task.answers, task.baseline)],
        )
        for (question, turn), each in zip(turns, found, strict=True)
    ]


def _row(
    question: JudgedItem, turn: int, judgments: Sequence[Judgment], value: float | None, lengths: list[int]
) -> JudgedRow:
    return JudgedRow(
        question.id,
        question.category,
        turn + 1,
        value,
        [each.value for each in judgments],
        [each.answer for each in judgments],
        next((each.problem for each in judgments if each.problem), ""),
        lengths,
        judge="",
    )


def _questions_text(question: JudgedItem, turn: int) -> str:
    """Return the questions up to a turn; of several, the last one is to be judged."""
    if turn == 0:
        return question.turns[0]
    asked = [f"JudgedItem {number}: {text}" for number, text in enumerate(question.turns[: turn + 1], start=1)]
    return "\n\n".join(
        [*asked, f"Each was asked after the answer to the one before. Judge the answers to question {turn + 1}."]
    )


def _answers_text(answers: Sequence[str], turn: int) -> str:
    if turn == 0:
        return answers[0]
    return "\n\n".join(f"Answer {number}: {text}" for number, text in enumerate(answers[: turn + 1], start=1))


def _reference(task: JudgedTask, question: JudgedItem, turn: int) -> str:
    known = task.references.get(question.id, question.references)
    return reference_block(known[turn] if turn < len(known) else None)


def judged_metrics(
    rows: Sequence[JudgedRow], benchmark: JudgedBenchmark, *, pairwise: bool, seed: int
) -> dict[str, Metric]:
    """Return the metrics of judged answers, with intervals under resampling of questions.

    Args:
        rows: All rows; those without a verdict are not counted.
        benchmark: Decides how the two orders of a pair count.
        pairwise: Whether answers were compared.
        seed: Seed of the resampling.
    """
    judged = [row for row in rows if row.value is not None]
    if not judged:
        return {}
    games = _wins(benchmark) if pairwise else _scores
    main = "win_rate" if pairwise else "score"
    found = {main: _mean(judged, games, seed)}
    turns, categories = _values(row.turn for row in judged), _values(row.category for row in judged)
    if len(turns) > 1:
        found |= {f"{main}/turn_{t}": _mean([row for row in judged if row.turn == t], games, seed) for t in turns}
    if len(categories) > 1:
        found |= {f"{main}/{c}": _mean([row for row in judged if row.category == c], games, seed) for c in categories}
    if pairwise:
        for name, outcome in (("won", 1.0), ("tied", 0.5), ("lost", 0.0)):
            found[name] = {"value": _share(row.value == outcome for row in judged)}
        counts = position_counts([_as_compared(row, benchmark) for row in rows])
        for name in ("consistent", "first", "second", "partial"):
            found[f"position/{name}"] = {"value": getattr(counts, name) / counts.judged}
        found["position_bias"] = {"value": counts.bias}
        found["length/baseline"] = {"value": float(np.mean([row.lengths[1] for row in judged]))}
    found["length"] = {"value": float(np.mean([row.lengths[0] for row in judged]))}
    return found


def _values(found: Iterable[Any]) -> list[Any]:
    return [*dict.fromkeys(found)]


def _share(of: Iterable[bool]) -> float:
    return float(np.mean([*of]))


def _scores(row: JudgedRow) -> list[tuple[float, float]]:
    assert row.value is not None
    return [(row.value, 1.0)]


def _wins(benchmark: JudgedBenchmark) -> Any:
    """Return a function from a row to its outcomes with their weights."""
    form, strong = benchmark.form, benchmark.strong_weight
    if strong is None:
        return _scores

    def games(row: JudgedRow) -> list[tuple[float, float]]:
        forward, backward = row.verdicts
        outcomes = (form.outcomes[forward], 1 - form.outcomes[backward])
        weights = [float(strong if verdict in form.strong else 1) for verdict in row.verdicts]
        return [*zip(outcomes, weights, strict=True)]

    return games


def _mean(rows: Sequence[JudgedRow], games: Any, seed: int) -> Metric:
    """Return the weighted mean of outcomes, with the percentile interval under resampling of questions."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        total = sums.setdefault(row.question_id, [0.0, 0.0])
        for outcome, weight in games(row):
            total[0] += outcome * weight
            total[1] += weight
    table = np.array([*sums.values()])
    found = bootstrap(lambda index: float(table[index, 0].sum() / table[index, 1].sum()), len(table), seed=seed)
    return found._asdict()


def _as_compared(row: JudgedRow, benchmark: JudgedBenchmark) -> Compared:
    forward, backward = row.verdicts
    outcomes = benchmark.form.outcomes
    first = None if forward is None else outcomes[forward]
    second = None if backward is None else 1 - outcomes[backward]
    empty = Judgment(None, "")
    return Compared(empty, empty, (first, second))
