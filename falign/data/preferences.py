"""Preference data of a run: sources read, tokenized, mixed and split into prompt trees."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from falign.data.blocks import Processing
from falign.data.chat_template import Tokenizer
from falign.data.examples import prompt_key
from falign.data.other_prompts import OtherPrompts
from falign.data.reading import PLAIN, read_tokenized
from falign.data.recognition import RowReader
from falign.data.reports import BadRowPolicy, BadRows, Notice, SourceReport, Tally
from falign.data.sources import DataSource, place_in_source
from falign.data.splits import draw, held_out_prompts
from falign.data.windows import Window
from falign.errors import ConfigError, DataError
from falign.scoring.batch import PromptTree

__all__ = ["Demonstrations", "LoadReport", "PreferenceData", "demonstrations", "load_preferences"]

OMITTED = ("rows kept", "distinct prompts")
"""Counts that the one line of a run leaves out."""


@dataclass(frozen=True)
class LoadReport:
    """Counts of the rows of a run.

    Attributes:
        sources: One report per training source, before drawing and splitting.
        eval_sources: One report per evaluation source.
        num_train: Trees to train on, after drawing and splitting.
        num_eval: Trees held out.
        shared_prompts: Evaluation prompts that also occur in training: 0 unless the evaluation sources overlap.
    """

    sources: tuple[SourceReport, ...]
    eval_sources: tuple[SourceReport, ...]
    num_train: int
    num_eval: int
    shared_prompts: int

    def notices(self) -> list[Notice]:
        """Return the counts as one line, then likely mistakes."""
        sources = (*self.sources, *self.eval_sources)
        parts = [f"{self.num_train} rows to train on, {self.num_eval} held out"]
        for source in sources:
            problems = (
                pair for pair in source.counts()[1:] if pair[1] and pair[0] not in ("rows kept", "distinct prompts")
            )
            parts += [f"{label} {count}" for label, count in problems]
        notices = [Notice("data: " + "; ".join(parts), is_warning=False)]
        notices += [Notice(f"data: {source.path}: {remark}") for source in sources for remark in source.remarks()]
        if self.shared_prompts:
            notices.append(
                Notice(
                    f"warning: {self.shared_prompts} held-out prompts also occur in training, so held-out values are "
                    "too optimistic."
                )
            )
        return notices


class PreferenceData(NamedTuple):
    """The trees of a run.

    Attributes:
        train: In the order of the sources and their rows.
        eval: Held out, or from the evaluation sources; empty without either.
        report: Counts of rows read, cut and left out.
    """

    train: list[PromptTree]
    eval: list[PromptTree]
    report: LoadReport


class _Loaded(NamedTuple):
    trees: list[PromptTree]
    prompts: list[str]
    report: SourceReport


def load_preferences(
    sources: Sequence[DataSource],
    tokenizer: Tokenizer,
    *,
    stop_token_ids: Collection[int],
    window: Window,
    preferences: bool = False,
    bad_rows: BadRowPolicy = "error",
    skip_by: str = "bad_rows=skip",
    eval_sources: Sequence[DataSource] = (),
    eval_fraction: float = 0.0,
    eval_size: int = 0,
    seed: int = 0,
    other_prompts: Collection[OtherPrompts] = (),
    processing: Processing = PLAIN,
) -> PreferenceData:
    """Read, tokenize, mix and split preference data.

    Args:
        sources: One source, or a mixture. Without weights they are concatenated; with weights, rows are drawn so
            that each source has its share, as many as possible without taking a row twice.
        tokenizer: The model's tokenizer.
        stop_token_ids: All tokens at which the model's generation ends, besides the tokenizer's EOS.
        window: Maximum lengths, and the policies for longer rows.
        preferences: Whether a row must prefer one of its completions to another, as pairwise objectives need.
        bad_rows: ``"error"`` stops at the first row that cannot be used; ``"skip"`` leaves such rows out and
            counts them.
        skip_by: How the user sets ``bad_rows="skip"``, for messages.
        eval_sources: Separate evaluation data.
        eval_fraction: In place of those, the share of prompts to hold out.
        eval_size: Or the number of rows to hold out. All rows of a prompt go to the same side.
        seed: Seed of drawing and splitting.
        other_prompts: Further prompts of the rows, which are added to these.
        processing: Number of processes that tokenize, and a cache on disk.

    Raises:
        ConfigError: Options contradict each other, or leave one side empty.
        DataError: A source or a row cannot be used.
    """
    if not sources:
        raise ConfigError("no data source is given; name at least one file, folder or Hub dataset.")
    if eval_sources and (eval_fraction or eval_size):
        raise ConfigError("eval_sources excludes eval_fraction and eval_size; choose one way to evaluate.")
    _require_weights_for_all_or_none(sources)
    _require_weights_for_all_or_none(eval_sources)

    def load(chosen: Sequence[DataSource]) -> list[_Loaded]:
        return [
            _load(
                source,
                tokenizer,
                stop_token_ids=stop_token_ids,
                window=window,
                preferences=preferences,
                bad_rows=BadRows(bad_rows, skip_by=skip_by),
                other_prompts=other_prompts,
                processing=processing,
            )
            for source in chosen
        ]

    loaded, eval_loaded = load(sources), load(eval_sources)
    trees, prompts = _mixed(loaded, sources, seed)
    eval_trees, eval_prompts = _mixed(eval_loaded, eval_sources, seed)
    held_out = held_out_prompts(prompts, fraction=eval_fraction, size=eval_size, seed=seed)
    if held_out:
        eval_trees = [tree for tree, prompt in zip(trees, prompts, strict=True) if prompt in held_out]
        trees = [tree for tree, prompt in zip(trees, prompts, strict=True) if prompt not in held_out]
    report = LoadReport(
        sources=tuple(part.report for part in loaded),
        eval_sources=tuple(part.report for part in eval_loaded),
        num_train=len(trees),
        num_eval=len(eval_trees),
        shared_prompts=len(set(eval_prompts) & set(prompts)),
    )
    return PreferenceData(trees, eval_trees, report)


def _require_weights_for_all_or_none(sources: Sequence[DataSource]) -> None:
    without = [source.path for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise ConfigError(
            f"some sources have a weight and {without} have none; give a weight to all of them or to none."
        )


def _load(
    source: DataSource,
    tokenizer: Tokenizer,
    *,
    stop_token_ids: Collection[int],
    window: Window,
    preferences: bool,
    bad_rows: BadRows,
    other_prompts: Collection[OtherPrompts],
    processing: Processing,
) -> _Loaded:
    reader = RowReader.of(source)
    tally = Tally(bad_rows)
    trees: list[PromptTree] = []
    prompts: list[str] = []
    for example, tokenized in read_tokenized(
        source,
        tokenizer,
        stop_token_ids=stop_token_ids,
        window=window,
        preferences=preferences,
        reader=reader,
        bad_rows=bad_rows,
        processing=processing,
    ):
        try:
            for other in other_prompts if tokenized.tree is not None else ():
                other.add_example(example, tokenized)
        except DataError as error:
            bad_rows.add(error)
            continue
        tally.add(example, tokenized)
        if tokenized.tree is not None:
            trees.append(tokenized.tree)
            prompts.append(prompt_key(example.prompt))
        if len(trees) == source.limit:
            break
    report = tally.report(source.path, reader.format, unused=reader.unused)
    if not trees:
        reason = f" The first bad row: {report.messages[0]}" if report.messages else ""
        raise DataError(f"{source.path}: none of its {report.read} rows can be used.{reason}")
    return _Loaded(trees, prompts, report)


def _mixed(loaded: Sequence[_Loaded], sources: Sequence[DataSource], seed: int) -> tuple[list[PromptTree], list[str]]:
    rows = [range(len(part.trees)) for part in loaded]
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        named = [
            [place_in_source(tree.place, source) for tree in part.trees]
            for part, source in zip(loaded, sources, strict=True)
        ]
        rows = draw(named, weights, seed=seed)
    pairs = list(zip(loaded, rows, strict=True))
    trees = [part.trees[i] for part, chosen in pairs for i in chosen]
    prompts = [part.prompts[i] for part, chosen in pairs for i in chosen]
    return trees, prompts


class Demonstrations(NamedTuple):
    """Data reduced to preferred completions.

    Attributes:
        data: The completions to imitate.
        rejected: Number of completions left out because another one of their row is preferred.
        undesirable: Number of rows left out because their label is false.
    """

    data: PreferenceData
    rejected: int
    undesirable: int


def demonstrations(data: PreferenceData) -> Demonstrations:
    """Return the completions to imitate: the most preferred ones of pairs and lists, and those labeled true.

    Raises:
        DataError: Nothing is left.
    """
    train, eval = ([_preferred(tree) for tree in side] for side in (data.train, data.eval))
    before = [*data.train, *data.eval]
    kept = [tree for tree in (*train, *eval) if tree is not None]
    found = [tree for tree in train if tree is not None]
    if not found:
        raise DataError(f"{data.train[0].place}: all rows are labeled false, so there is nothing to imitate.")
    held_out = [tree for tree in eval if tree is not None]
    undesirable = len(before) - len(kept)
    rejected = sum(len(tree.completion_ids) for tree in before) - sum(len(tree.completion_ids) for tree in kept)
    report = replace(data.report, num_train=len(found), num_eval=len(held_out))
    return Demonstrations(PreferenceData(found, held_out, report), rejected - undesirable, undesirable)


def _preferred(tree: PromptTree) -> PromptTree | None:
    values = tree.preference
    if values is None:
        return tree
    if len(values) == 1:  # a label
        return tree if values[0] > 0 else None
    best = max(values)
    rows = [i for i, value in enumerate(values) if value == best]
    weights, counted = tree.token_weights, tree.counted
    return replace(
        tree,
        completion_ids=tuple(tree.completion_ids[i] for i in rows),
        preference=tuple(values[i] for i in rows),
        token_weights=None if weights is None else tuple(weights[i] for i in rows),
        counted=None if counted is None else tuple(counted[i] for i in rows),
    )
