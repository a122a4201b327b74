"""Evaluation on a reward benchmark: its items scored under every reward that a model defines, and summarized."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from falign.choices import require_choice
from falign.data import BadRows, Window
from falign.errors import ConfigError, DataError
from falign.evaluation import benchmarks
from falign.evaluation.benchmarks import Benchmark, OwnTexts
from falign.evaluation.item_scorer import BASELINES, ComparedScores, ItemScorer, ReferenceFreeScores, score_items
from falign.evaluation.item_stream import ItemStream, ItemTree, read_items
from falign.evaluation.loading import Scored, load_alone, load_compared, load_run, positions_of, run_objective
from falign.evaluation.reward_options import ITEMS_FILE, ClassifierOptions, ComparisonOptions, RewardOptions
from falign.evaluation.reward_summary import reward_summary
from falign.evaluation.score_output import ScoreOutput
from falign.evaluation.summaries import RewardSummary, write_summary
from falign.models import base_of, model_identity, stop_token_ids
from falign.models.tokenizers import tokenizer_fingerprint
from falign.registry import is_own_name
from falign.rewards import Reward
from falign.rewards.classifier import ClassifierReward, load_classifier
from falign.runs.loading import Named, chat_of_run, is_run, named, reference_name, result_folder, texts_of
from falign.runs.named_code import import_from
from falign.terminal import Terminal, progress

__all__ = ["evaluate_rewards", "run_reward_evaluation"]

PROBED_ITEMS = 16
LONGEST_DEFAULT = 4096  # tokens of a window that the user has not set


def evaluate_rewards(
    model: Named,
    benchmark: str,
    file: str | Path | None = None,
    *,
    name: str | None = None,
    subset: str | Sequence[str] = (),
    split: str | None = None,
    reference: str | Path | None = None,
    divergence: str | None = None,
    beta: float | None = None,
    reference_free: bool = False,
    max_length: int | None = None,
    long_items: str = "skip",
    tokens_per_batch: int = 4096,
    bad_rows: str = "skip",
    layout: str = "auto",
    dtype: str | None = None,
    scorers: str | Sequence[str] | None = None,
    classifier: str | None = None,
    classifier_text: str | None = None,
    classifier_label: str | None = None,
    chat: bool | None = None,
    seed: int = 0,
    num_resamples: int = 1000,
    out: str | Path | None = None,
    overwrite: bool = False,
    limit: int | None = None,
    trust_code: bool = False,
    console: Console | None = None,
) -> RewardSummary:
    """Score a benchmark under all rewards that a model defines; a stopped call continues if repeated.

    Args:
        model: A run, scored by its own objective; or any model.
        benchmark: A name of :func:`falign.evaluation.benchmarks.names`, such as ``preferences`` for any file of pairs
            or lists; or a class of your own as ``module:Class``.
        file: Its file or folder; by default it is read from the Hub.
        name: Results go to ``RUN/evaluation/NAME``; by default the benchmark's name.
        subset: Subsets of the benchmark to score; all if empty.
        split: Split of a folder or of the Hub's dataset.
        reference: A model to compare a model with; a run has its own reference.
        divergence: f of a model's implicit reward, by default ``reverse_kl``; a run has its own.
        beta: β of a model's implicit reward, by default 0.1; a run has its own.
        reference_free: Score a model without a reference, by its log-probabilities.
        max_length: Maximum length of a prompt with its longest completion, in tokens. By default the run's own for
            ``preferences``, otherwise what the model allows, at most 4,096.
        long_items: Handling of longer items: ``skip`` leaves them out and counts them, ``cut`` cuts them as in
            training, ``error`` stops.
        tokens_per_batch: Number of tokens scored at once; affects memory and speed.
        bad_rows: ``skip`` leaves out unusable rows and counts them, ``error`` stops at the first.
        layout: ``tree``, ``padded``, or ``auto`` for trees if the models can read them.
        dtype: Data type of both models, by default that of their files; a run has its own.
        scorers: Names of scorers; by default all that are available.
        classifier: A sequence classifier to use as a further scorer.
        classifier_text: Its input: ``chat``, ``joined``, ``pair`` or ``completion``.
        classifier_label: Name of the label to read, if it has several.
        chat: Whether plain texts of a file are turns; by default as in the run.
        seed: Seed of the scorer ``random`` and of the intervals.
        num_resamples: Number of bootstrap resamples for the intervals.
        out: A folder for the results, required for a model.
        overwrite: Replace existing results, whether complete or not.
        limit: Maximum number of items; the first ones are used.
        trust_code: Whether code that the run folder names may run.
        console: Shows progress; standard error by default.

    Raises:
        FalignError: The arguments, the model or the data do not allow it; scores so far are kept for the next call.
    """
    if classifier is None and (classifier_text or classifier_label):
        raise ConfigError("`classifier_text` and `classifier_label` need `classifier`: give the model too.")
    path, given, trust_code = named(model, trust_code=trust_code)
    found = _benchmark(path, benchmark, chat)
    options = RewardOptions(
        model=path,
        comparison=ComparisonOptions(reference_name(reference), divergence, beta, dtype, reference_free),
        benchmark=found,
        file=None if file is None else str(file),
        split=split,
        subsets=texts_of(subset),
        limit=limit,
        scorers=None if scorers is None else texts_of(scorers),
        classifier=None if classifier is None else ClassifierOptions(classifier, classifier_text, classifier_label),
        max_length=max_length,
        long_items=long_items,
        tokens_per_batch=tokens_per_batch,
        bad_rows=bad_rows,
        layout=layout,
        seed=seed,
        num_resamples=num_resamples,
        out=result_folder(path, name or found.name, None if out is None else Path(out)),
        overwrite=overwrite,
        given=given,
        trust_code=trust_code,
    )
    return run_reward_evaluation(options, console or Terminal(stderr=True, highlight=False, soft_wrap=True))


def run_reward_evaluation(options: RewardOptions, console: Console) -> RewardSummary:
    """Score the items, write the files, and return the summary.

    Args:
        options: All options.
        console: Shows progress and notices.

    Raises:
        FalignError: As for :func:`evaluate_rewards`.
    """
    options.check()
    names = options.chosen_scorers(rewarding=_has_implicit_reward(options))
    bad_rows = BadRows(options.bad_rows, skip_by="bad_rows=skip")
    with console.status("reading"):
        items = read_items(
            options.benchmark, options.file, split=options.split, subsets=options.subsets, bad_rows=bad_rows
        )
    with console.status(f"loading {escape(options.model)}"):
        scored = _load_models(options)
        classifier, classifier_record = _load_classifier(options.classifier)
    stops = stop_token_ids(base_of(scored.policy), scored.tokenizer)
    stream = ItemStream(
        items,
        scored.tokenizer,
        stop_token_ids=stops,
        window=scored.window,
        long_items=options.long_items,
        bad_rows=bad_rows,
        limit=options.limit,
    )
    trees = iter(stream)
    first = list(islice(trees, PROBED_ITEMS))
    if not first:
        raise DataError(f"{options.source}: no item can be scored: {stream.skipped_message()}.")
    scorer, layout = _scorer(options, scored, names, classifier, first, console)
    record = {
        **scored.record,
        "tokenizer": tokenizer_fingerprint(scored.tokenizer),
        "stop_token_ids": sorted(stops),
        "layout": layout,
        **{f"classifier.{name}": value for name, value in classifier_record.items()},
        **_record_of_items(options, scored.window, names),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    output = ScoreOutput(options.out / ITEMS_FILE, record=record, overwrite=options.overwrite)
    count = len(items) if options.limit is None else min(options.limit, len(items))
    with output, _progress(console, count) as show:
        rows = score_items(
            chain(first, trees),
            scorer,
            options.benchmark,
            output,
            tokens_per_batch=options.tokens_per_batch,
            on_batch=show,
        )
        with console.status("intervals"):
            summary = reward_summary(options, scored, rows, names, skipped=stream.skipped(), record=record)
        summary = summary.model_copy(update={"files": {ITEMS_FILE: output.checksum()}})
        # The summary comes before the items' final name: a call that stops between the two can be repeated, while
        # one that finds finished items is refused.
        write_summary(options.out, summary)
        output.finish()
    if skipped := stream.skipped_message():
        console.print(f"not scored: {skipped}", style="yellow", markup=False)
    return summary


def _benchmark(model: str, name: str, chat: bool | None) -> Benchmark:
    """Return the benchmark; one of the user's own texts reads plain texts as the run did, unless `chat` is set."""
    if is_own_name(name):
        import_from(Path.cwd())
    found = benchmarks.get(name)
    if isinstance(found, OwnTexts):
        return found.with_chat(chat_of_run(model) if chat is None else chat)
    if chat is not None:
        raise ConfigError(f"`chat` applies only to preferences: {name} defines whether its texts are turns.")
    return found


def _has_implicit_reward(options: RewardOptions) -> bool:
    """Return whether an implicit reward is defined: by a model's reference, or by the objective of a run."""
    if not is_run(options.model):
        return True
    return run_objective(options.model, given=options.given, trust_code=options.trust_code).rewarding


def _load_models(options: RewardOptions) -> Scored:
    """Return the policy with its reference, objective and window."""
    comparison = options.comparison
    dtype = comparison.dtype or "auto"
    if is_run(options.model):
        scored = load_run(
            options.model,
            max_length=options.max_length,
            any_objective=True,
            given=options.given,
            trust_code=options.trust_code,
        )
        if isinstance(options.benchmark, OwnTexts) and options.max_length is None:
            return scored  # the run's own window, so that its own data give the values of its training
    elif comparison.reference is None:
        scored = load_alone(options.model, dtype=dtype, max_length=options.max_length)
    else:
        scored = load_compared(
            options.model,
            reference=comparison.reference,
            divergence=comparison.divergence,
            beta=comparison.beta,
            dtype=dtype,
            max_length=options.max_length,
        )
    window = scored.window
    if not is_run(options.model):
        window = replace(window, long_prompt="cut", long_completion="cut")
    if options.max_length is None:
        room = min([LONGEST_DEFAULT, *filter(None, map(positions_of, scored.models()))])
        window = replace(window, max_length=room)
    return scored._replace(window=window)


def _load_classifier(options: ClassifierOptions | None) -> tuple[Reward | None, dict[str, Any]]:
    """Return the classifier as a reward, and a record that identifies it."""
    if options is None:
        return None, {}
    model, tokenizer = load_classifier(options.path)
    text: Any = options.text or ("chat" if tokenizer.chat_template else "joined")
    require_choice("classifier_text", text, ["chat", "joined", "pair", "completion"])
    record = {**model_identity(model), "text": text, "label": options.label}
    return ClassifierReward(model, tokenizer, text=text, label=options.label), record


def _scorer(
    options: RewardOptions,
    scored: Scored,
    names: tuple[str, ...],
    classifier: Reward | None,
    first: Sequence[ItemTree],
    console: Console,
) -> tuple[ItemScorer, str]:
    """Return the scorer of items and its layout, after a check of the models on the first items."""
    trees = [tree for _, tree in first]
    if scored.reference is None:
        plain, choice = scored.choose_scorer(trees, layout=options.layout)
        of_trees = ReferenceFreeScores(policy=scored.policy, scorer=plain)
    else:
        compared, choice = scored.scorer(trees, layout=options.layout)
        of_trees = ComparedScores(compared, rewarding=scored.rewarding)
    console.print(f"layout: {choice.layout}, {choice.reason}", style=None if choice.as_requested else "yellow")
    if {*names} <= {"classifier", *BASELINES}:
        of_trees = None  # no scorer reads the policy, so it need not run
    scorer = ItemScorer(names=names, of_trees=of_trees, classifier=classifier, seed=options.seed)
    return scorer, choice.layout


def _record_of_items(options: RewardOptions, window: Window, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the inputs of items, tokens and scorers, besides the models."""
    local = None if options.file is None or not Path(options.file).exists() else Path(options.file)
    return {
        "benchmark": options.benchmark.name,
        "source": options.source if local is None else str(local.absolute()),
        "content": None if local is None else _content(local),
        "split": options.split,
        "subsets": list(options.subsets),
        "limit": options.limit,
        "chat": options.benchmark.chat if isinstance(options.benchmark, OwnTexts) else None,
        **asdict(window),
        "long_items": options.long_items,
        "scorers": list(names),
        "seed": options.seed,
    }


def _content(path: Path) -> str:
    """Return a hash of a file, or of all files of a folder with their names."""
    digest = hashlib.sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]:
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int, int], None]]:
    """Show progress, and say once if an earlier call is continued."""
    with progress(console, "items", total=total) as show:
        resuming = True

        def update(done: int, resumed: int) -> None:
            nonlocal resuming
            show(done)
            if resuming and done > resumed:
                resuming = False
                if resumed:
                    console.print(f"continuing after {resumed:,} items of an earlier call")

        yield update
