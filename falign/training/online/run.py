"""Assembly of online runs: prompts, rollouts and rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from torch import nn
from transformers import TrainerCallback

from falign.data import PromptData, PromptRow
from falign.errors import ConfigError
from falign.models.tokenizers import tokenizer_fingerprint
from falign.objectives import Objective, complete
from falign.references import REFERENCE
from falign.rewards import RewardSum
from falign.rewards.combination import row_check
from falign.rollouts import EngineSetup, SamplingParams, TransformersEngine
from falign.rollouts.buffer import RolloutBuffer
from falign.runfile.config import RunConfig
from falign.runfile.reward_config import build_rewards
from falign.runs.folder import RunFolder
from falign.scoring import PromptTree
from falign.scoring.batch import token_rows
from falign.seeds import mixed
from falign.training.course import Course
from falign.training.online.groups import DividedSampler, GroupSampler
from falign.training.online.metrics import CompletionsTable
from falign.training.online.rehearsal_file import other_origin, read_rehearsal
from falign.training.online.tracker_tables import TrackerTables
from falign.training.online.trainer import OnlineTrainer
from falign.training.parts import Language, Parts, load_parts
from falign.training.processes import is_writer, num_processes

__all__ = ["online_trainer"]

PROBE_TOKENS = 16
"""Tokens of the completions on which layouts and references are checked."""

FIT_VERSION = -(10**9)
"""Version and rollout number of samples before training; distinct from those of training and evaluation."""


def online_trainer(
    config: RunConfig,
    language: Language,
    objective: Objective,
    *,
    callbacks: Sequence[TrainerCallback],
    console: Console,
) -> tuple[OnlineTrainer, PromptData]:
    """Load everything for an online run, prompts first: a bad row is found before any weight is loaded.

    Raises:
        FalignError: A part of the run cannot be loaded, or parts do not fit together.
    """
    assert config.prompts is not None
    sections = config.reference_sections()
    own = sections.get(REFERENCE)
    if config.objective.needs_samples and not (own and own.prompt is None and own.starts_as_policy(config)):
        raise ConfigError(
            "objective.target.lambdas is missing. They are fitted on samples of the untrained policy, which "
            "is not the reference here: give lambdas."
        )
    rollout = config.rollout

    def advise(text: str) -> None:
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)

    course = Course.of(config.training, advise)
    with console.status("reading prompts"):
        rewards = _rewards(config, language)
        check = None if rewards is None else row_check(rewards)
        data = config.prompts.build(language.tokenizer, seed=config.seed, check=check)
        rehearsal = (
            RolloutBuffer()
            if config.rehearsal is None
            else read_rehearsal(config.rehearsal.path, num_tokens=len(language.tokenizer))
        )
        prompts = [(row.place, row.prompt_ids) for row in (*data.train, *data.eval)]
        config.check_token_rows(language.tokenizer, [*prompts, *token_rows(rehearsal.trees)])
        others = config.other_prompts(language.tokenizer)
        for other in others.values():
            for row in (*data.train, *data.eval):
                other.add_prompt(row, max_new_tokens=rollout.max_new_tokens)
    _print_counts(data, console)
    _warn_if_rehearsed(rehearsal, data, console)
    per_update = -(-rollout.prompts // rollout.minibatches)
    steps_per_epoch = -(-len(data.train) // rollout.prompts) * rollout.num_updates
    args = config.training.build(
        config.output_dir,
        seed=config.seed,
        gradient_accumulation_steps=-(-per_update // (config.training.per_device_train_batch_size * num_processes())),
        steps_per_epoch=steps_per_epoch,
    )
    parts = load_parts(
        config,
        language,
        objective,
        args,
        make_probes=lambda policy: _probes(policy, data, language, min(rollout.max_new_tokens, PROBE_TOKENS)),
        first_rows=lambda: [row.prompt_ids for row in data.train],
        longest=max(
            [config.prompts.max_length + rollout.max_new_tokens, *(tree.num_tokens for tree in rehearsal.trees)]
        ),
        prompts=others,
        console=console,
    )
    if config.rehearsal is not None:
        _tell_origin(config.rehearsal.path, parts, language, console)
    params = SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        stop_token_ids=frozenset() if rollout.ignore_stop else language.stop_tokens,
    )
    rollout.engine.check_processes(num_processes())
    setup = EngineSetup(
        parts.policy,
        pad_token_id=language.pad_token_id,
        max_batch_tokens=rollout.max_batch_tokens,
        encode=lambda text: language.tokenizer(text, add_special_tokens=False)["input_ids"],
        prompt_ids=[row.prompt_ids for row in _longest(data)],
        params=params,
        longest=config.prompts.max_length + rollout.max_new_tokens,
        ahead=rollout.ahead,
    )
    engine = rollout.engine.open(setup, console)
    held_out = rollout.evaluation
    samplers = [
        DividedSampler(GroupSampler(engine, rewards, language.tokenizer, chosen, completions=completions, seed=seed))
        for chosen, completions, seed in (
            (params, rollout.completions, config.seed),
            (replace(params, temperature=held_out.temperature), held_out.completions, mixed(config.seed, "evaluation")),
        )
    ]
    if config.objective.needs_samples:
        objective = _fitted(config, samplers[0], data, parts, console)
    trainer = OnlineTrainer(
        parts.policy,
        references=parts.references,
        objective=objective,
        measures=config.build_measures(),
        args=args,
        sampler=samplers[0],
        evaluation_sampler=samplers[1],
        prompts=data.train,
        eval_prompts=data.eval,
        rollout=rollout,
        rehearsal=rehearsal,
        rehearsal_size=0 if config.rehearsal is None else config.rehearsal.completions,
        scorer=parts.scorer,
        table=CompletionsTable(RunFolder(config.output_dir).completions_file if is_writer() else None),
        max_gap=engine.max_gap,
        value_head=config.critic.build(parts.policy) if "values" in objective.needs else None,
        warm_up=config.critic.warm_up,
        skip_bad=config.training.skip_bad,
        advise=advise,
        processing_class=language.tokenizer,
        callbacks=list(callbacks),
        course=course,
        master_weights=config.training.master_weights is not None,
    )
    if config.training.log_completions:
        tables = TrackerTables(trainer.callback_handler.callbacks)
        trainer.add_callback(tables)
        trainer.table.tell = tables.add
    trainer.record = parts.record
    return trainer, data


def _rewards(config: RunConfig, language: Language) -> RewardSum | None:
    """Return the rewards of the run; None if it has none, since its objective reads none."""
    if not config.rewards:
        return None
    rollout = config.rollout
    rewards = build_rewards(config.rewards, date=language.date, outcome=rollout.outcome)
    rewards.require_group(rollout.completions, field="rollout.completions")
    rewards.require_group(rollout.evaluation.completions, field="rollout.evaluation.completions")
    return rewards


def _fitted(
    config: RunConfig,
    sampler: DividedSampler,
    data: PromptData,
    parts: Parts,
    console: Console,
) -> Objective:
    """Fit the target's moments on samples of the untrained policy, which equals the reference."""
    per_prompt = max(2, -(-config.rollout.fit_samples // len(data.train)))
    rows = data.train[: -(-config.rollout.fit_samples // per_prompt)]
    sampler.engine.publish(parts.policy, FIT_VERSION)
    with console.status(f"sampling {len(rows) * per_prompt} completions of the reference"):
        draw = sampler.with_completions(per_prompt).sample(rows, version=FIT_VERSION, number=FIT_VERSION)
    sampler.engine.retire(FIT_VERSION)
    values = [features for group in draw.groups for features in group.features()]
    features = torch.tensor(values, dtype=torch.float64)
    fitted = config.objective.objective(features)
    means = ", ".join(f"{mean:.3f}" for mean in features.mean(dim=0).tolist())
    console.print(
        f"target: means {means} under the reference; {complete(fitted).at(0).target}",  # pyright: ignore[reportAttributeAccessIssue]
        highlight=False,
        soft_wrap=True,
    )
    return fitted


def _print_counts(data: PromptData, console: Console) -> None:
    report = data.report
    parts = [f"{report.num_train} prompts to train on, {report.num_eval} held out"]
    for label, count in (("cut", report.cut), ("too long", report.dropped), ("bad rows", report.bad)):
        parts += [f"{label} {count}"] if count else []
    console.print("prompts: " + "; ".join(parts), highlight=False, markup=False)
    if report.shared_prompts:
        console.print(
            f"warning: {report.shared_prompts} of {report.num_eval} held-out prompts also occur in training, so "
            "held-out values are too optimistic.",
            style="yellow",
            soft_wrap=True,
        )


def _warn_if_rehearsed(rehearsal: RolloutBuffer, data: PromptData, console: Console) -> None:
    """Warn if held-out prompts are among the rehearsed ones."""
    stored = {tree.prompt_ids for tree in rehearsal.trees}
    if shared := sum(row.prompt_ids in stored for row in data.eval):
        console.print(
            f"warning: {shared} of {len(data.eval)} held-out prompts are also rehearsed, so held-out values are too "
            "optimistic.",
            style="yellow",
            soft_wrap=True,
        )


def _tell_origin(stored: str, parts: Parts, language: Language, console: Console) -> None:
    """Warn if the rehearsed completions come from another model, or from this one at another precision."""
    differs = other_origin(
        stored,
        # A moving reference has no hash of its weights.
        weights=parts.references[REFERENCE].identity().get("weights", parts.record["base_weights"]),
        config=parts.record["reference_config"],
        tokenizer=tokenizer_fingerprint(language.tokenizer),
    )
    if differs is not None:
        console.print(
            f"rehearsal: {differs}: the log-probabilities in it are not the reference's. Sample it again, "
            "unless this is intended.",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _probes(policy: nn.Module, data: PromptData, language: Language, max_new_tokens: int) -> list[PromptTree]:
    """Sample two completions of the longest prompts with the run's settings; made-up ones would be too unlikely."""
    rows = _longest(data)
    engine = TransformersEngine(policy, pad_token_id=language.pad_token_id)
    engine.publish(policy, FIT_VERSION)
    params = SamplingParams(max_new_tokens=max_new_tokens)
    rollouts = engine.sample([row.prompt_ids for row in rows], 2, params, version=FIT_VERSION, seed=0)
    return [
        PromptTree(
            row.prompt_ids, tuple(rollout.completion_ids for rollout in rollouts[2 * i : 2 * i + 2]), place=row.place
        )
        for i, row in enumerate(rows)
    ]


def _longest(data: PromptData) -> list[PromptRow]:
    return sorted(data.train, key=lambda row: len(row.prompt_ids))[-2:]
