"""The section of the run file that says what is rewarded: a list of models, told apart by ``kind``."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_serializer, model_validator
from typing_extensions import override

from falign import divergences
from falign.errors import ConfigError
from falign.rewards import (
    Lexicon,
    OwnFunction,
    Reward,
    RewardSum,
    TimedFunction,
    WeightedReward,
    Words,
    choice,
    fit_lexicon,
    mathematics,
    number,
    read_labelled,
    read_lexicon,
    regex,
    sections,
    sql,
)
from falign.runfile.base_config import FrozenModel, PythonObject

if TYPE_CHECKING:
    from falign.rewards.classifier import ClassifierReward

__all__ = [
    "ChoiceConfig",
    "ClassifierConfig",
    "FunctionConfig",
    "ImplicitConfig",
    "LexiconConfig",
    "MathConfig",
    "NumberConfig",
    "PythonRewardConfig",
    "RegexConfig",
    "RewardConfig",
    "SectionsConfig",
    "SentimentConfig",
    "SqlConfig",
    "WordsConfig",
    "build_rewards",
]


class _Part(FrozenModel):
    """Fields of all rewards."""

    name: str | None = None
    """Logged as ``reward/<name>``; by default the kind, or the function's name."""
    weight: float = 1.0
    """Factor in the sum; 0 only logs it."""

    def models_that_read_ids(self) -> Iterator[tuple[str, str]]:
        """Return the field and path of each model that is given the policy's token ids."""
        yield from ()

    def model_paths(self) -> Iterator[str]:
        """Return the paths of the models that it loads."""
        yield from ()

    def data_paths(self) -> Iterator[Path]:
        """Return the paths of the files that it reads."""
        yield from ()

    @abstractmethod
    def build(self) -> Reward:
        """Return the reward."""

    def build_at(self, date: datetime | None) -> Reward:
        """Return the reward as it is on a date, at present where None; most have nothing to do with it."""
        return self.build()


class _Verifier(_Part):
    """Fields of all rewards that run in separate processes."""

    timeout: float = Field(default=10.0, gt=0)
    """Seconds per completion, after which its process is killed."""
    failed: float | None = 0.0
    """The reward of a completion whose call timed out or raised; null leaves it out. Both are counted."""


class FunctionConfig(_Part):
    """A function of your own, in falign's form ``(prompts, completions, **columns) -> list``, in TRL's or verl's."""

    kind: Literal["function"] = "function"
    function: str
    """``module:function``; it may be ``async``."""
    form: Literal["falign", "trl", "verl"] = "falign"
    """The calling convention: ``trl`` gives completions of conversations as lists of one message, ``verl`` calls
    ``compute_score(data_source, solution_str, ground_truth, extra_info)`` for each completion."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds per completion. The function is then called for one completion at a time, in processes of its own;
    without it, for all at once, in this one."""
    failed: float | None = 0.0
    """With ``timeout``: what a completion is worth that was stopped, or raised and was counted; null leaves it out."""
    errors: Literal["stop", "count"] = "stop"
    """With ``timeout``: ``count`` counts exceptions instead of stopping the run."""

    @model_validator(mode="after")
    def _needs_a_timeout(self) -> FunctionConfig:
        given = sorted({"failed", "errors"} & self.model_fields_set)
        if self.timeout is None and given:
            raise ValueError(f"{given[0]} applies to single completions, so it needs a timeout")
        return self

    @model_serializer(mode="wrap")
    def _without_what_a_timeout_allows(self, handler: Any) -> dict[str, Any]:
        dropped = frozenset[str]() if self.timeout is not None else frozenset({"failed", "errors"})
        return {name: value for name, value in handler(self).items() if name not in dropped}

    def build(self) -> Reward:
        """Return the function, with its deadline if it has one.

        Raises:
            ConfigError: It cannot be imported.
        """
        if self.timeout is None:
            return OwnFunction(self.function, self.form)
        return TimedFunction(
            self.function, timeout=self.timeout, failed=self.failed, errors=self.errors, form=self.form
        )


class MathConfig(_Verifier):
    """1 if the last answer equals the row's as an expression, else 0."""

    kind: Literal["math"] = "math"
    answer: str = "answer"
    """Column with LaTeX, an expression, a number, or a text whose answer follows ``####``."""
    decimals: int = Field(default=6, ge=0)
    """Digits after the point to which numbers must agree."""

    def build(self) -> Reward:
        """Return the verifier."""
        return mathematics(answer=self.answer, decimals=self.decimals, timeout=self.timeout, failed=self.failed)


class NumberConfig(_Verifier):
    """1 if the last number is the row's, else 0."""

    kind: Literal["number"] = "number"
    answer: str = "answer"
    """Column with a number, or a text with one at its end or after ``####``."""
    tolerance: float = Field(default=1e-6, ge=0)
    """Largest difference as a share of the answer."""

    def build(self) -> Reward:
        """Return the verifier."""
        return number(answer=self.answer, tolerance=self.tolerance, timeout=self.timeout, failed=self.failed)


class ChoiceConfig(_Verifier):
    """1 if the completion's final choice of a letter is the row's, else 0."""

    kind: Literal["choice"] = "choice"
    answer: str = "answer"
    """Column with the letter."""
    letters: str = Field(default="ABCDE", min_length=2)
    options: str | None = None
    """Column with the options' texts, which a completion may end with instead."""

    def build(self) -> Reward:
        """Return the verifier."""
        return choice(
            answer=self.answer,
            letters=self.letters,
            options=self.options,
            timeout=self.timeout,
            failed=self.failed,
        )


class RegexConfig(_Verifier):
    """1 if a regular expression matches, else 0."""

    kind: Literal["regex"] = "regex"
    pattern: str
    """Python's syntax; flags go inside, ``(?s)``."""
    whole: bool = False
    """True requires a match of the whole completion."""
    answer: str | None = None
    """Column that the first group must equal, in the last match."""

    def build(self) -> Reward:
        """Return the verifier."""
        return regex(self.pattern, whole=self.whole, answer=self.answer, timeout=self.timeout, failed=self.failed)


class SectionsConfig(_Verifier):
    """1 if the completion is a sequence of sections ``<tag>…</tag>`` and nothing else, else 0."""

    kind: Literal["sections"] = "sections"
    tags: list[str] = Field(min_length=1)
    """Their names, in order: ``[think, answer]``."""

    def build(self) -> Reward:
        """Return the verifier."""
        return sections(self.tags, timeout=self.timeout, failed=self.failed)


class SqlConfig(_Verifier):
    """1 if the query returns the same as the row's query, on a read-only SQLite file, else 0."""

    kind: Literal["sql"] = "sql"
    root: Path
    """Folder of the databases; no file outside it is opened."""
    database: str = "{db_id}.sqlite"
    """File in it, made of columns in braces."""
    answer: str = "query"
    """Column with the row's query."""
    max_rows: int = Field(default=10_000, ge=1)
    """Most rows that the row's query may return."""
    skip_empty: bool = False
    """True skips rows whose query returns no rows, because many wrong queries return none either."""

    def build(self) -> Reward:
        """Return the verifier.

        Raises:
            ConfigError: The folder is not there.
        """
        if not self.root.is_dir():
            raise ConfigError(f"rewards: root={str(self.root)!r} is no folder; give the one that holds the databases.")
        return sql(
            self.root.absolute(),
            database=self.database,
            answer=self.answer,
            max_rows=self.max_rows,
            skip_empty=self.skip_empty,
            timeout=self.timeout,
            failed=self.failed,
        )


class WordsConfig(_Part):
    """Presence of whole words, ignoring case."""

    kind: Literal["words"] = "words"
    words: list[str] = []
    """The same for all rows; or"""
    column: str | None = None
    """the column with each row's: a list, or a text with white space between them."""
    mode: Literal["all", "any", "none", "share"] = "all"

    def build(self) -> Reward:
        """Return the reward.

        Raises:
            ConfigError: Both or neither of ``words`` and ``column`` are given.
        """
        return Words(self.words, self.column, self.mode)


class LexiconConfig(_Part):
    """The sum of weighted words."""

    kind: Literal["lexicon"] = "lexicon"
    path: Path
    """A word per line, with a tab and its weight behind it where that is not 1."""
    output: Literal["sum", "mean", "present", "probability"] = "sum"
    """``mean``: per word; ``present``: 1 if one of them occurs, else 0; ``probability``: logistic function of
    the sum."""

    @override
    def data_paths(self) -> Iterator[Path]:
        yield self.path

    def build(self) -> Reward:
        """Return the reward.

        Raises:
            DataError: A line is no word with its weight.
        """
        return Lexicon(read_lexicon(self.path), output=self.output)


class SentimentConfig(_Part):
    """The log-odds of a class by the words of labelled texts (naive Bayes)."""

    kind: Literal["sentiment"] = "sentiment"
    path: Path
    """JSONL, also ``.gz``, with ``text`` and ``label``."""
    positive: str
    """The label whose log-odds are the reward."""
    output: Literal["sum", "mean", "probability"] = "sum"
    """``sum``: the log-odds; ``mean``: per word; ``probability``: of the class."""
    smoothing: float = Field(default=1.0, gt=0)
    """Added to every count."""

    @override
    def data_paths(self) -> Iterator[Path]:
        yield self.path

    def build(self) -> Reward:
        """Return the reward.

        Raises:
            DataError: A row lacks a column, or there are not two classes.
        """
        texts, labels = read_labelled(self.path, positive=self.positive)
        return fit_lexicon(texts, labels, smoothing=self.smoothing, output=self.output)


class ClassifierConfig(_Part):
    """The score of a sequence classifier."""

    kind: Literal["classifier"] = "classifier"
    path: str
    """Hub name or folder."""
    text: Literal["joined", "completion", "pair", "chat"] = "joined"
    """The classifier's input: prompt and completion as one text, the completion, a pair of texts, or a conversation."""
    output: Literal["score", "logprob", "probability"] = "score"
    """``score``: the head's raw value."""
    label: str | int | None = None
    """Name or index; needed where the head has several."""
    max_length: int | None = Field(default=None, ge=1)
    """Most tokens; by default what the model allows. What is longer loses its beginning."""
    tokens_per_batch: int = Field(default=16_384, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fastest"] = "auto"
    device: str | None = None
    """By default the GPU if there is one."""
    revision: str | None = None

    @override
    def model_paths(self) -> Iterator[str]:
        yield self.path

    def build(self) -> ClassifierReward:
        """Load the classifier.

        Raises:
            ModelError: There is none.
            ConfigError: The label is missing or unknown.
        """
        from falign.rewards.classifier import ClassifierReward, load_classifier

        model, tokenizer = load_classifier(self.path, dtype=self.dtype, device=self.device, revision=self.revision)
        return ClassifierReward(
            model,
            tokenizer,
            text=self.text,
            output=self.output,
            label=self.label,
            max_length=self.max_length,
            tokens_per_batch=self.tokens_per_batch,
        )

    @override
    def build_at(self, date: datetime | None) -> Reward:
        from falign.models.tokenizers import fix_date

        reward = self.build()
        if date is not None:
            fix_date(reward.tokenizer, date)
        return reward


class ImplicitConfig(_Part):
    """The implicit reward of a model trained by f-DPO, β f'(π/π_ref)."""

    kind: Literal["implicit"] = "implicit"
    path: str
    """π: hub name or folder, with the policy's tokens."""
    reference: str
    """π_ref."""
    divergence: str = "reverse_kl"
    beta: float = Field(default=0.1, gt=0)
    layout: Literal["padded", "tree"] = "padded"
    """``tree``: prompts are computed once for all their completions, for models that read it."""
    tokens_per_batch: int = Field(default=8192, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fastest"] = "auto"
    device: str | None = None
    """By default the GPU if there is one."""

    @override
    def model_paths(self) -> Iterator[str]:
        yield from (self.path, self.reference)

    @override
    def models_that_read_ids(self) -> Iterator[tuple[str, str]]:
        yield from (("path", self.path), ("reference", self.reference))

    def build(self) -> Reward:
        """Load both models.

        Raises:
            ConfigError: The divergence is unknown or has no barrier.
            ModelError: A model is not there.
        """
        import torch

        from falign.models import load_model
        from falign.models.heads import share_head
        from falign.rewards.implicit import ImplicitReward
        from falign.scoring import Scorer

        place = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            divergence = divergences.get(self.divergence)
            model, reference = (load_model(p, dtype=self.dtype, device=place) for p in (self.path, self.reference))
            share_head(model, reference)
            return ImplicitReward(
                model, reference, divergence, self.beta, Scorer(self.layout), tokens_per_batch=self.tokens_per_batch
            )
        except ValueError as error:
            raise ConfigError(f"rewards: {error}") from error


class PythonRewardConfig(PythonObject, _Part):
    """A function that a program gave, or a reward that is an object."""

    name: str
    """As for other rewards; by default that of the function or the class."""
    form: Literal["falign", "trl", "verl"] = "falign"
    """As for ``function``."""

    def build(self) -> Reward:
        """Return the reward.

        Raises:
            ConfigError: It is not at hand.
        """
        given = self.given(f"reward {self.name}")
        return OwnFunction(self.name, self.form, given) if inspect.isroutine(given) else given


def _kind(value: Any) -> str:
    return str(value.get("kind", "function") if isinstance(value, dict) else getattr(value, "kind", "function"))


RewardConfig = Annotated[
    Annotated[FunctionConfig, Tag("function")]
    | Annotated[MathConfig, Tag("math")]
    | Annotated[NumberConfig, Tag("number")]
    | Annotated[ChoiceConfig, Tag("choice")]
    | Annotated[RegexConfig, Tag("regex")]
    | Annotated[SectionsConfig, Tag("sections")]
    | Annotated[SqlConfig, Tag("sql")]
    | Annotated[WordsConfig, Tag("words")]
    | Annotated[LexiconConfig, Tag("lexicon")]
    | Annotated[SentimentConfig, Tag("sentiment")]
    | Annotated[ClassifierConfig, Tag("classifier")]
    | Annotated[ImplicitConfig, Tag("implicit")]
    | Annotated[PythonRewardConfig, Tag("python")],
    Discriminator(_kind),
]
"""One reward of the list ``rewards``: ``kind`` names one of these, the first where it is left out."""


def build_rewards(
    configs: Sequence[RewardConfig], *, date: datetime | None = None, outcome: str | None = None
) -> RewardSum:
    """Return the weighted sum of the rewards of a run file.

    Args:
        configs: The list ``rewards``.
        date: Date for chat templates that write one; None is today.
        outcome: Name of the reward that decides what passes; see :class:`falign.rewards.RewardSum`.

    Raises:
        ConfigError: It is empty, two have one name, or one cannot be built.
    """
    return RewardSum(
        tuple(
            WeightedReward(config.name or _default_name(config), config.build_at(date), config.weight)
            for config in configs
        ),
        outcome,
    )


def _default_name(config: RewardConfig) -> str:
    return config.function.rpartition(":")[2] if isinstance(config, FunctionConfig) else config.kind
