"""Evaluation of a model's completions: sampled, rewarded, scored and summarized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from falign.data import PromptRow
from falign.divergences import Divergence, get
from falign.evaluation.frontier import frontier_point, frontier_summary, with_ideals
from falign.evaluation.loading import Scored
from falign.evaluation.sample_inputs import (
    check_tokens,
    load_policy,
    load_rewards,
    prompts_digest,
    prompts_to_sample,
    read_config,
)
from falign.evaluation.sample_metrics import divergence_metrics, sample_metrics
from falign.evaluation.sample_options import FILES, ComparisonOptions, PromptOptions, SampleOptions, samples_folder
from falign.evaluation.sample_prompts import sample_progress, sample_prompts
from falign.evaluation.sample_scorer import ReferenceEngine, SampleRow, SampleScorer
from falign.evaluation.score_output import ScoreOutput, reopen
from falign.evaluation.summaries import SampleSummary, write_summary
from falign.models import base_of, stop_token_ids
from falign.models.tokenizers import pad_token_id, tokenizer_fingerprint
from falign.rewards import RewardSum
from falign.rollouts import Engine, SamplingParams, TransformersEngine
from falign.runfile import RunConfig
from falign.runfile.schedule_config import last_of
from falign.runs.loading import Named, named, reference_name, texts_of
from falign.scoring import PromptTree
from falign.seeds import mixed
from falign.terminal import Terminal
from falign.training.online.groups import GroupSampler

__all__ = ["evaluate_samples", "run_sample_evaluation"]

PROBE_TOKENS = 16


def evaluate_samples(
    model: Named,
    prompts: Any = None,
    *,
    split: str = "train",
    template: str | None = None,
    chat: bool | None = None,
    limit: int | None = None,
    rewards: Any = None,
    pass_reward: float | None = None,
    num_completions: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    reference: str | Path | None = None,
    divergence: str | Sequence[str] = (),
    anchors: bool = True,
    num_reference_completions: int | None = None,
    checkpoint: int | None = None,
    prompts_per_batch: int = 8,
    dtype: str | None = None,
    name: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    console: Console | None = None,
) -> SampleSummary:
    """Sample completions and measure reward, divergence, diversity and pass@k; a stopped call continues if repeated.

    Args:
        model: A run, or any model.
        prompts: Rows, or a file, folder or Hub name; by default the run's own held-out prompts.
        split: Split of `prompts`.
        template: The prompt, with a row's columns in braces: ``"{question}"``.
        chat: Whether a plain prompt is a user's turn; by default as in the run, or if the model has a chat template.
        limit: Maximum number of prompts; the first ones are used.
        rewards: Functions or sections, as for ``falign.train``; a YAML file with the section ``rewards`` of a run
            file; or a run: the rewards of an online run, the implicit reward of an offline run. By default the run's
            own.
        pass_reward: The least reward of a completion that passes, for pass@k; an online run has its own.
        num_completions: Completions per prompt; by default as the run evaluates itself, or 8.
        max_new_tokens: Maximum length of a completion; by default the run's own, or 128.
        temperature: 0 decodes greedily; divergences need 1.
        seed: Seed of the samples and the intervals.
        reference: A model to compare the policy with; by default the run's own reference.
        divergence: Names of divergences, or one, to measure in addition to the default ones.
        anchors: Also sample the reference, for the lines of the frontier.
        num_reference_completions: Completions of the reference per prompt; by default as many as the policy's.
        checkpoint: The step of a checkpoint of the run.
        prompts_per_batch: Number of prompts sampled at once.
        dtype: Data type of a model; by default as in its files.
        name: Results go to ``RUN/evaluation/NAME``; by default ``samples``, or ``samples-STEP`` for a checkpoint.
        out: A folder for the results, required for a model.
        overwrite: Replace existing results, whether complete or not.
        trust_code: Whether code that the run folder names may run.
        console: Shows progress; standard error by default.

    Raises:
        FalignError: The arguments, the model or the data do not allow it; samples so far are kept for the next call.
    """
    path, given, trust_code = named(model, trust_code=trust_code)
    options = SampleOptions(
        model=path,
        prompts=PromptOptions(prompts, split, template, chat, limit),
        rewards=rewards,
        pass_reward=pass_reward,
        num_completions=num_completions,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        comparison=ComparisonOptions(
            reference_name(reference), texts_of(divergence), anchors, num_reference_completions
        ),
        checkpoint=checkpoint,
        prompts_per_batch=prompts_per_batch,
        dtype=dtype,
        out=samples_folder(path, name=name, checkpoint=checkpoint, out=out),
        overwrite=overwrite,
        given=given,
        trust_code=trust_code,
    )
    return run_sample_evaluation(options, console or Terminal(stderr=True, highlight=False, soft_wrap=True))


def run_sample_evaluation(options: SampleOptions, console: Console) -> SampleSummary:
    """Sample, reward and score completions, write the files, and return the summary.

    Args:
        options: All options.
        console: Shows progress and notices.

    Raises:
        FalignError: As for :func:`evaluate_samples`.
    """
    options.check()
    config = read_config(options)
    divergences = options.measured_divergences(config)
    with console.status("loading rewards"):
        loaded = load_rewards(options, config)
    with console.status(f"loading {escape(options.model)}"):
        scored = load_policy(options, config)
    check_tokens(options.model, scored.tokenizer, loaded)
    rewards = loaded.rewards
    prompts, source = prompts_to_sample(options, config, scored, rewards, console)
    settings = options.sampling_settings(config)
    samplers = _samplers(options, scored, rewards, settings)
    scorer = _scorer(scored, samplers[0], prompts, console)
    record = {
        # Neither samples nor their scores depend on the objective.
        **{name: value for name, value in scored.record.items() if not name.startswith("objective.")},
        "tokenizer": tokenizer_fingerprint(scored.tokenizer),
        "layout": scorer.scorer.layout,
        "prompts": prompts_digest(prompts),
        "rewards": loaded.record,
        **settings,
        "prompts_per_batch": options.prompts_per_batch,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    # If an earlier call stopped after one file was renamed and before the other, continue with both.
    reopen(options.out / FILES[1], sibling=options.out / FILES[0])
    with ExitStack() as stack, sample_progress(console, len(prompts) * len(samplers)) as show:
        outputs = [
            stack.enter_context(ScoreOutput(options.out / name, record=record, overwrite=options.overwrite))
            for name, _ in zip(FILES, samplers, strict=False)
        ]
        groups = [
            sample_prompts(
                prompts,
                sampler,
                scorer,
                output,
                version=0,
                of_reference=output is not outputs[0],
                prompts_per_batch=options.prompts_per_batch,
                on_batch=show,
            )
            for sampler, output in zip(samplers, outputs, strict=True)
        ]
        with console.status("intervals and frontier"):
            found = _summary(options, config, scored, groups, divergences, rewards.passing)
        found |= {"source": source, "sampling": settings, "record": record}
        found["files"] = {output.path.name: output.checksum() for output in outputs}
        summary = SampleSummary.model_validate(found)
        # The summary comes before the files' final names: a call that stops between the two can be repeated, while
        # one that finds finished samples is refused.
        write_summary(options.out, summary)
        for output in reversed(outputs):
            output.finish()
    if len(outputs) == 1:  # samples of the reference from an earlier call do not belong to this summary
        (options.out / FILES[1]).unlink(missing_ok=True)
    return summary


def _samplers(
    options: SampleOptions, scored: Scored, rewards: RewardSum, settings: Mapping[str, Any]
) -> list[GroupSampler]:
    """Return the policy's sampler, and the reference's if its completions are wanted."""
    stops = frozenset() if settings["ignore_stop"] else stop_token_ids(base_of(scored.policy), scored.tokenizer)
    params = SamplingParams(
        settings["max_new_tokens"], temperature=options.temperature, stop_token_ids=frozenset(stops)
    )
    pad_id = pad_token_id(scored.tokenizer)
    engine = TransformersEngine(scored.policy, pad_token_id=pad_id)
    engine.publish(scored.policy, version=0)

    def sampler(engine: Engine, name: str, seed: int) -> GroupSampler:
        return GroupSampler(engine, rewards, scored.tokenizer, params, completions=settings[name], seed=seed)

    found = [sampler(engine, "num_completions", options.seed)]
    if scored.reference is not None and options.comparison.anchors and options.samples_policy:
        other = ReferenceEngine(scored.reference, scored.policy, pad_token_id=pad_id)
        found.append(sampler(other, "num_reference_completions", mixed(options.seed, "reference")))
    return found


def _scorer(scored: Scored, sampler: GroupSampler, prompts: Sequence[PromptRow], console: Console) -> SampleScorer:
    """Return a scorer whose layout is chosen on short completions of the two longest prompts.

    They are sampled, because the check compares log-probabilities, and those of random tokens are too low for it.
    """
    longest = sorted(prompts, key=lambda row: len(row.prompt_ids))[-2:]
    params = replace(sampler.params, max_new_tokens=min(PROBE_TOKENS, sampler.params.max_new_tokens))
    rollouts = sampler.engine.sample([row.prompt_ids for row in longest], 2, params, version=0, seed=0)
    probes = [
        PromptTree(row.prompt_ids, tuple(each.completion_ids for each in rollouts[2 * i : 2 * i + 2]))
        for i, row in enumerate(longest)
    ]
    scorer, choice = scored.choose_scorer(probes, layout="auto")
    console.print(f"layout: {choice.layout}, {choice.reason}", style=None if choice.as_requested else "yellow")
    return SampleScorer(policy=scored.policy, reference=scored.reference, scorer=scorer)


def _summary(
    options: SampleOptions,
    config: RunConfig | None,
    scored: Scored,
    groups: Sequence[list[list[SampleRow]]],
    divergences: Mapping[str, Divergence],
    outcome: str | None,
) -> dict[str, Any]:
    """Return the summary's fields, except those about files and inputs."""
    own, *others = groups
    pass_reward = options.passing_reward(config)
    metrics = sample_metrics(own, pass_reward=pass_reward, outcome=outcome, seed=options.seed)
    frontier = None
    if scored.reference is not None and options.samples_policy:
        anchors = others[0] if others else None
        metrics |= divergence_metrics(own, divergences, reference_groups=anchors, seed=options.seed)
        if anchors is not None:
            of_reference = sample_metrics(anchors, pass_reward=pass_reward, outcome=outcome, seed=options.seed)
            # Rows hold the entropy of the policy, which says nothing about the reference on the reference's samples.
            metrics |= {f"reference/{name}": each for name, each in of_reference.items() if name != "entropy"}
            axis = get("reverse_kl")
            point = frontier_point(options.label, metrics, axis.name)
            ideals = with_ideals(divergences.values())
            frontier = frontier_summary([point], anchors, axis=(axis.name, axis), ideals=ideals)
    objective = {} if config is None else config.objective.model_dump()
    of_run = None if scored.reference is None else scored.reference.identity()["kind"]
    return {
        "kind": "samples",
        "name": options.out.name,
        "model": options.model,
        "label": options.label,
        "checkpoint": options.checkpoint,
        "reference": options.comparison.reference or of_run,
        "divergence": last_of(objective.get("divergence")),
        "beta": last_of(objective.get("beta")),
        "num_prompts": len(own),
        "num_completions": len(own[0]),
        "pass_reward": pass_reward,
        "metrics": {name: each._asdict() for name, each in metrics.items()},
        "frontier": frontier,
    }
