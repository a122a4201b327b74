"""Options of a reward evaluation, and the checks that need no model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from falign.choices import require_choice
from falign.errors import ConfigError
from falign.evaluation.benchmarks import Benchmark
from falign.evaluation.item_scorer import BASELINES, OF_POLICY, OF_REWARD, SCORERS
from falign.runs.loading import Given, is_run

__all__ = ["ITEMS_FILE", "ClassifierOptions", "ComparisonOptions", "RewardOptions"]

ITEMS_FILE = "items.jsonl"
WITHOUT_REFERENCE = ("`reference_free`", "`dtype`")
"""Comparison options that mean something without a reference."""


class ComparisonOptions(NamedTuple):
    """The definition of a model's implicit reward, under the names of the arguments; a run has its own.

    Attributes:
        reference: A model to compare with.
        divergence: Name of f; None for the reverse KL.
        beta: β; None for 0.1.
        dtype: Data type of both models; None for that of their files.
        reference_free: Whether the model is scored by its log-probabilities alone.
    """

    reference: str | None = None
    divergence: str | None = None
    beta: float | None = None
    dtype: str | None = None
    reference_free: bool = False

    def check(self, model: str) -> None:
        """Reject options that contradict the run or model, or each other.

        Raises:
            ConfigError: With the options.
        """
        given = [f"`{name}`" for name, value in self._asdict().items() if value not in (None, False)]
        if is_run(model):
            if given:
                raise ConfigError(
                    f"{model} is a run, which is scored as it was trained, and {', '.join(given)} would change its "
                    "rewards: leave it out, choose some `scorers`, or export the run as a merged model and score that."
                )
        elif self.reference_free and (others := [each for each in given if each not in WITHOUT_REFERENCE]):
            raise ConfigError(f"`reference_free` excludes what needs a reference, {', '.join(others)}: leave one out.")
        elif self.reference is None and not self.reference_free:
            raise ConfigError(
                f"{model} is not a run folder, so it has no reference: give reference=MODEL, such as the model that it "
                "was trained from, or reference_free=True."
            )


class ClassifierOptions(NamedTuple):
    """A sequence classifier that scores the completions too.

    Attributes:
        path: The model.
        text: Its input, see :class:`falign.rewards.classifier.ClassifierReward`; None for ``chat`` if its tokenizer has
            a chat template, else ``joined``.
        label: Name of the label to read, if it has several.
    """

    path: str
    text: str | None = None
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """All options of one reward evaluation; :func:`falign.evaluate_rewards` documents them.

    Attributes:
        scorers: Names of ``SCORERS``; None for all that the model, its reference and its objective allow.
        classifier: The classifier, if any.
        num_resamples: Resamples of the intervals; no score depends on it.
        out: Folder of ``items.jsonl`` and ``summary.json``.
        given: Objects in memory that replace sections of the run file.
    """

    model: str
    comparison: ComparisonOptions
    benchmark: Benchmark
    file: str | None
    split: str | None
    subsets: tuple[str, ...]
    limit: int | None
    scorers: tuple[str, ...] | None
    classifier: ClassifierOptions | None
    max_length: int | None
    long_items: Any
    tokens_per_batch: int
    bad_rows: Any
    layout: str
    seed: int
    num_resamples: int
    out: Path
    overwrite: bool
    given: Given | None = None
    trust_code: bool = False

    @property
    def source(self) -> str:
        """The items' place: a path, or the name of a dataset on the Hub."""
        return self.file or self.benchmark.hub_name or self.benchmark.name

    def check(self) -> None:
        """Reject options that contradict each other or the model, and results that would be overwritten.

        Raises:
            ConfigError: With the option and the remedy.
        """
        require_choice("layout", self.layout, ["auto", "tree", "padded"])
        require_choice("bad_rows", self.bad_rows, ["error", "skip"])
        require_choice("long_items", self.long_items, ["skip", "cut", "error"])
        self.comparison.check(self.model)
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{self.out} is a file: give a folder.")
        if (self.out / ITEMS_FILE).exists() and not self.overwrite:
            raise ConfigError(
                f"{self.out} holds results: give another name or folder, or overwrite=True to score again."
            )

    def chosen_scorers(self, *, rewarding: bool) -> tuple[str, ...]:
        """Return the names of the scorers, in the order of tables.

        Args:
            rewarding: Whether an implicit reward is defined.

        Raises:
            ConfigError: A name is unknown, or needs something that is missing.
        """
        available = {*OF_POLICY, *BASELINES}
        if not self.comparison.reference_free:
            available |= {"log_ratio", *(OF_REWARD if rewarding else ())}
        if self.classifier is not None:
            available.add("classifier")
        if self.scorers == ():
            raise ConfigError(f"`scorers` is empty: give some of {', '.join(_ordered(available))}, or leave it out.")
        for name in self.scorers or ():
            require_choice("scorers", name, SCORERS)
            if name not in available:
                remedy = {"classifier": "give classifier=MODEL", "log_ratio": "give reference=MODEL"}.get(
                    name, "it needs a reference, and an objective with an implicit reward"
                )
                raise ConfigError(f"scorers={name}: {remedy}; available are {', '.join(_ordered(available))}.")
        return _ordered(available if self.scorers is None else self.scorers)


def _ordered(names: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in SCORERS if name in names)
