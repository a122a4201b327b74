"""Completions before and after training: ``samples.json``, and the first and last rows of ``completions.jsonl``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from falign.json_lines import read_journal
from falign.report.metric_names import Number
from falign.report.runs import ReportedRun

__all__ = ["MOST_COMPLETIONS", "MOST_PROMPTS", "Answer", "Answers", "answers_of"]

MOST_PROMPTS, MOST_COMPLETIONS = 4, 3


class Answer(NamedTuple):
    """A completion, with its reward if it is known."""

    text: str
    reward: Number | None = None


class Answers(NamedTuple):
    """The answers to one prompt.

    Attributes:
        prompt: The prompt; turns of a conversation have a line each.
        before: Before training.
        after: After training, or at the last step so far.
        when: What the two are called.
    """

    prompt: str
    before: tuple[Answer, ...]
    after: tuple[Answer, ...]
    when: tuple[str, str] = ("before", "after")


def answers_of(run: ReportedRun) -> list[Answers]:
    """Return answers to the prompts of the run file, and to the first prompts of an online run.

    Raises:
        ConfigError: A line of ``completions.jsonl`` is damaged.
    """
    written = [Answers(sample.prompt, (Answer(sample.before),), (Answer(sample.after),)) for sample in run.samples]
    return [*written, *_online(run)]


def _online(run: ReportedRun) -> Iterator[Answers]:
    steps: dict[bool, list[int]] = {True: [], False: []}
    for row in _rows(run):
        steps[row["held_out"]].append(row["step"])
    held_out = len(set(steps[True])) > 1  # samples from before training alone give no comparison
    found = steps[held_out]
    if not found or min(found) == max(found):
        return
    first, last = min(found), max(found)
    by_prompt: dict[str, tuple[list[Answer], list[Answer]]] = {}
    for row in _rows(run):
        if row["held_out"] != held_out or row["step"] not in (first, last):
            continue
        both = by_prompt.setdefault(_text(row["prompt"]), ([], []))
        both[row["step"] == last].append(Answer(row["completion"], row["reward"]))
    after = f"after {last} steps"
    # Training draws other prompts at each step, so the first and the last ones are shown side by side.
    answered = [(prompt, both) for prompt, both in by_prompt.items() if all(both) or not held_out]
    for prompt, (before, later) in answered[:MOST_PROMPTS]:
        yield Answers(prompt, tuple(before[:MOST_COMPLETIONS]), tuple(later[:MOST_COMPLETIONS]), ("before", after))


def _rows(run: ReportedRun) -> Iterator[dict[str, Any]]:
    return read_journal(run.folder.completions_file)


def _text(prompt: str | list[dict[str, str]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in prompt)
