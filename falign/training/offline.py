"""Assembly of offline runs, on given completions: pairs, lists, demonstrations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from transformers import TrainerCallback

from falign.data import Notice, PreferenceData, demonstrations
from falign.data.labels import label_counts
from falign.data.other_prompts import OtherPrompts
from falign.errors import ConfigError, DataError
from falign.models.heads import head_rows
from falign.objectives import Measure, Objective, complete, references_of, token_weighting
from falign.references import Reference, objective_inputs, read_whole, with_members
from falign.runfile.config import RunConfig
from falign.scoring import evaluation_mode
from falign.scoring.batch import PromptTree, data_margins, data_weights, token_rows
from falign.terminal import progress
from falign.training.course import Course
from falign.training.parts import Language, Parts, load_parts
from falign.training.references import cached
from falign.training.step_means import with_mismatched
from falign.training.trainer import AlignmentTrainer

__all__ = ["offline_trainer", "read_data"]


def offline_trainer(
    config: RunConfig,
    language: Language,
    objective: Objective,
    *,
    callbacks: Sequence[TrainerCallback],
    console: Console,
) -> tuple[AlignmentTrainer, PreferenceData]:
    """Load everything for an offline run, data first: a bad row is found before any weight is loaded.

    Raises:
        FalignError: The data, the models or the settings do not fit together, or one of them is missing or invalid.
    """
    assert config.data is not None

    def tell(notice: Notice) -> None:
        style = "yellow" if notice.is_warning else None
        console.print(notice.text, style=style, highlight=False, markup=False, soft_wrap=True)

    course = Course.of(config.training, tell=lambda text: tell(Notice(text)))
    with console.status("reading data"):
        prompts = config.other_prompts(language.tokenizer)
        data = read_data(config, language, objective, tell=tell, prompts=prompts)
    args = config.training.build(config.output_dir, seed=config.seed)
    # Two ordinary trees, and the two longest with several completions: these reveal a mask with which one completion
    # sees another.
    probes = [*data.train[:2], *sorted(data.train, key=lambda tree: (len(tree.completion_ids) > 1, tree.num_tokens))]
    parts = load_parts(
        config,
        language,
        objective,
        args,
        make_probes=lambda policy: [*probes[:2], *probes[-2:]],
        first_rows=lambda: [ids for _, ids in token_rows(data.train)],
        longest=config.data.max_length,
        prompts=prompts,
        console=console,
    )
    measures = config.build_measures()
    trainer = AlignmentTrainer(
        parts.policy,
        references=_with_caches(
            config,
            parts,
            language,
            objective,
            [*data.train, *data.eval, *_mismatched(objective, data)],
            console,
        ),
        objective=objective,
        args=args,
        train_trees=data.train,
        eval_trees=data.eval,
        scorer=parts.scorer,
        tokens_per_batch=config.training.tokens_per_batch,
        measures=measures,
        skip_bad=config.training.skip_bad,
        advise=lambda text: tell(Notice(text)),
        processing_class=language.tokenizer,
        callbacks=list(callbacks),
        course=course,
        master_weights=config.training.master_weights is not None,
    )
    trainer.record = parts.record
    return trainer, data


def read_data(
    config: RunConfig,
    language: Language,
    objective: Objective,
    *,
    tell: Callable[[Notice], None],
    prompts: Mapping[str, OtherPrompts] | None = None,
) -> PreferenceData:
    """Read the data of a run, and refuse rows that cannot be trained on.

    Args:
        config: The run.
        language: Its tokenizer.
        objective: The objective to minimize.
        tell: Called with the counts of kept and dropped rows, and with likely mistakes.
        prompts: From :meth:`RunConfig.other_prompts`; the rows' other prompts are added to these.

    Raises:
        ConfigError: The settings do not fit the data.
        DataError: A source or a row cannot be used.
        ModelError: A model has no embedding for a token id of the data.
    """
    assert config.data is not None
    data = config.data.build(
        language.tokenizer,
        stop_token_ids=language.stop_tokens,
        seed=config.seed,
        preferences="pairs" in complete(objective).preference_kinds,
        other_prompts=(config.other_prompts(language.tokenizer) if prompts is None else prompts).values(),
    )
    config.check_token_rows(language.tokenizer, [*token_rows([*data.train, *data.eval])])
    for notice in data.report.notices():
        tell(notice)
    _check_token_weights(data, objective, tell)
    _check_row_weights(data, objective, tell)
    _check_margins(data, objective, tell)
    if "preference" not in objective.needs:
        data = _without_rejected(data, tell)
    elif "labels" in complete(objective).preference_kinds:
        counts, _ = label_counts(data.train), label_counts(data.eval)
        if (remark := complete(objective).label_remark(*counts)) is not None:
            tell(Notice(f"warning: data: {remark}"))
        _mismatched(objective, data)  # refuses rows that cannot be paired, before any weight is loaded
    _check_budget(config, data)
    return data


def _check_token_weights(data: PreferenceData, objective: Objective, tell: Callable[[Notice], None]) -> None:
    """Refuse rows without the weights of tokens that the objective reads; report weights that nothing reads."""
    rows = [*data.train, *data.eval]
    if token_weighting(objective.needs) != "data":
        if any(tree.token_weights is not None for tree in rows):
            tell(Notice("warning: data: the rows have weights of tokens, which the objective does not read."))
        return
    try:
        data_weights(rows)
    except ValueError as error:
        raise DataError(str(error)) from error


def _check_row_weights(data: PreferenceData, objective: Objective, tell: Callable[[Notice], None]) -> None:
    """Refuse weights of rows that the objective would leave out, and report those that it reads."""
    rows = [*data.train, *data.eval]
    weighted = [tree for tree in rows if tree.weight != 1]
    if not weighted:
        return
    if not complete(objective).reads_row_weights:
        raise ConfigError(
            f"{weighted[0].place}: the row has the weight {weighted[0].weight:g}, which {type(objective).__name__} "
            "does not read: set `ignore: [weight]` for its source, or choose another objective (one of your own names "
            "row_weights in its needs)."
        )
    values = [tree.weight for tree in rows]
    tell(
        Notice(
            f"data: the rows have weights from {min(values):g} to {max(values):g}, which the loss is weighted by",
            is_warning=False,
        )
    )


def _check_margins(data: PreferenceData, objective: Objective, tell: Callable[[Notice], None]) -> None:
    """Refuse rows without the margin that the objective reads; report margins that nothing reads."""
    rows = [*data.train, *data.eval]
    if "margin" in objective.needs:
        try:
            data_margins(rows)
        except ValueError as error:
            raise DataError(str(error)) from error
    elif all(tree.margin is not None for tree in rows):
        tell(Notice("data: the rows have a column margin, which the objective does not read."))


def _without_rejected(data: PreferenceData, tell: Callable[[Notice], None]) -> PreferenceData:
    """Drop the completions that are not preferred, for an objective without preferences, and report it."""
    found = demonstrations(data)
    left_out = [
        f"{count} {what}"
        for count, what in (
            (found.rejected, "completions that are not the preferred ones"),
            (found.undesirable, "rows with label false"),
        )
        if count
    ]
    if left_out:
        tell(
            Notice(
                "data: the objective reads no preferences, so it imitates the preferred completions; left out: "
                f"{' and '.join(left_out)}"
            )
        )
    return found.data


def _check_budget(config: RunConfig, data: PreferenceData) -> None:
    budget, longest = config.training.tokens_per_batch, max(data.train, key=lambda tree: tree.num_tokens)
    if budget is not None and longest.num_tokens > budget:
        raise ConfigError(
            f"training.tokens_per_batch={budget} is less than the {longest.num_tokens} tokens of {longest.place} with "
            "its completions: raise it, or lower data.max_length."
        )


def _mismatched(objective: Objective, data: PreferenceData) -> list[PromptTree]:
    """Return the prompts with the completions of other prompts, where the objective scores them."""
    answers = complete(objective)
    rows = [*with_mismatched(answers, data.train), *with_mismatched(answers, data.eval, then=data.train)]
    return [tree.mismatched for tree in rows if tree.mismatched_ids]


def _with_caches(
    config: RunConfig,
    parts: Parts,
    language: Language,
    objective: Objective,
    trees: Sequence[PromptTree],
    console: Console,
) -> dict[str, Reference]:
    """Return the references; those with a cache compute their log-probabilities now and then need no model."""
    references = dict(parts.references)
    measures = config.build_measures()
    whole = read_whole(references, references_of([*objective.measures.values(), *measures.values()]))
    for name, section in config.reference_sections().items():
        if section.cache is None:
            continue
        top_k = section.cache_top_k or 0
        if top_k > (size := head_rows(parts.policy)):
            raise ConfigError(
                f"{config.section_of(name)}.cache_top_k={top_k} is more than the {size} tokens of the vocabulary: "
                "lower it."
            )
        if name in whole and not top_k:
            console.print(
                f"{config.section_of(name)}.cache is not used: the objective, a measure or a combination needs "
                "the reference's whole distributions, computed live.",
                style="yellow",
            )
            continue
        fill = functools.partial(
            cached,
            parts.references[name],
            parts.policy,
            language.tokenizer,
            directory=section.cache,
            batch_size=config.training.per_device_eval_batch_size,
            scorer=parts.scorer,
            top_k=top_k,
        )
        if name in whole:  # refuses a measure that reads more, before the teacher has read all data
            first = with_members({**references, name: fill(trees[:1], progress=lambda done, total: None)})
            _score(parts, first, objective, measures, trees[0])
        with progress(console, f"prompts scored by {name}") as show:
            # The default binds `show` of this iteration.
            references[name] = fill(trees, progress=lambda done, total, show=show: show(done, total=total))
    return with_members(references)


@torch.no_grad()
def _score(
    parts: Parts,
    references: Mapping[str, Reference],
    objective: Objective,
    measures: Mapping[str, Measure],
    tree: PromptTree,
) -> None:
    """Compute what the objective and the measures read of one row.

    Raises:
        ConfigError: A measure reads more of a reference than its cache holds.
    """
    batch = parts.scorer.lay_out([tree], model=parts.policy)
    with evaluation_mode(parts.policy):
        objective_inputs(
            parts.policy,
            batch,
            references=references,
            objective=objective,
            measures=measures,
            chunk_tokens=parts.scorer.chunk_tokens,
        )
