"""The runs of a report, read from their folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from falign.errors import ConfigError
from falign.evaluation.summaries import JudgeSummary, RewardSummary, SampleSummary, Summary, read_evaluations
from falign.json_lines import read_journal
from falign.report.metric_names import Number
from falign.report.palette import Color, marker_of, run_color
from falign.runfile.base_config import ObjectiveSection
from falign.runfile.objective_config import OBJECTIVES
from falign.runs import RunFolder
from falign.runs.summary import Answered, Best, RunSummary

__all__ = ["MOST_COMPLETIONS", "MOST_PROMPTS", "Answer", "Answers", "ReportedRun", "answers_of", "read_runs"]


@dataclass(frozen=True)
class ReportedRun:
    """The contents of a report for one run.

    Attributes:
        label: The shortest end of its path that is unique in the report.
        index: Its index in the report, which determines its color and marker.
        folder: The run folder.
        run_file: The resolved settings that the run began with.
        manifest: The manifest: versions, model, reference, data.
        logs: The lines of ``metrics.jsonl``.
        before: Held-out values before training; empty without held-out data.
        after: The same after training; empty until the run has ended.
        samples: Prompts of the run file, answered before and after.
        evaluations: Results of ``falign evaluate``.
        ended: Whether it was finished when it was read.
    """

    label: str
    index: int
    folder: RunFolder
    run_file: dict[str, Any]
    manifest: dict[str, Any]
    logs: list[dict[str, Any]]
    before: dict[str, Number]
    after: dict[str, Number]
    samples: list[Answered]
    evaluations: tuple[Summary, ...]
    ended: bool = False

    @property
    def best(self) -> Best | None:
        """The best model, if the run has kept that instead of its last one."""
        found = self.manifest.get("best")
        return None if found is None else Best.model_validate(found)

    @property
    def objective_section(self) -> type[ObjectiveSection]:
        """The class of its section ``objective``; the base class for a custom objective."""
        kind = self.run_file["objective"]["kind"]
        return OBJECTIVES.get(kind) if kind in OBJECTIVES.members else ObjectiveSection

    @property
    def color(self) -> Color:
        """The color of the run in all plots and tables."""
        return run_color(self.index)

    @property
    def marker(self) -> str:
        """The marker of the run in all plots and tables."""
        return marker_of(self.index)

    @property
    def online(self) -> bool:
        """True for online runs."""
        return self.run_file.get("prompts") is not None

    @property
    def rewards(self) -> dict[str, RewardSummary]:
        """Reward benchmarks by the names of their folders."""
        return {found.name: found for found in self.evaluations if isinstance(found, RewardSummary)}

    @property
    def sampled(self) -> dict[str, SampleSummary]:
        """Evaluations of samples by the names of their folders."""
        return {found.name: found for found in self.evaluations if isinstance(found, SampleSummary)}

    @property
    def judged(self) -> dict[str, JudgeSummary]:
        """Evaluations by an LLM judge by the names of their folders."""
        return {found.name: found for found in self.evaluations if isinstance(found, JudgeSummary)}


def read_runs(paths: Sequence[str | Path]) -> list[ReportedRun]:
    """Read the runs of a report, finished or not.

    Raises:
        ConfigError: A path is not a run folder, is given twice, or a file of a run is damaged.
    """
    folders = [RunFolder.open(path) for path in paths]
    places = Counter(folder.path.resolve() for folder in folders)
    if twice := [place for place, count in places.items() if count > 1]:
        raise ConfigError(f"{twice[0]} is given twice: name each run once.")
    labels = _labels([folder.path.resolve() for folder in folders])
    return [_read(folder, index, label) for index, (folder, label) in enumerate(zip(folders, labels, strict=True))]


def _read(folder: RunFolder, index: int, label: str) -> ReportedRun:
    # Read the summary first: a running run writes it last, so with it all other files are complete.
    summary = RunSummary.read(folder) if (folder.path / "summary.json").is_file() else None
    begun = folder.read_json("before.json")["metrics"] if (folder.path / "before.json").is_file() else {}
    return ReportedRun(
        label=label,
        index=index,
        folder=folder,
        run_file=folder.read_settings(),
        manifest=folder.read_json("manifest.json"),
        logs=folder.metrics(),
        before=begun if summary is None else summary.before,
        after={} if summary is None else summary.after,
        samples=[] if summary is None else summary.samples,
        evaluations=read_evaluations(folder.path),
        ended=summary is not None,
    )


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the shortest unique suffix of each path."""
    return [next(end for end in _ends(path) if sum(end in _ends(other) for other in paths) == 1) for path in paths]


def _ends(path: Path) -> list[str]:
    parts = path.parts
    return ["/".join(parts[-n:]) for n in range(1, len(parts))] + [str(path)]


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
        when: Labels of both.
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
    held_out = len(set(steps[True])) > 1  # only samples of several steps give a comparison
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
