"""A run from its file to the trained adapter."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed

from falign.data import PreferenceData
from falign.errors import ConfigError, DataError
from falign.models import (
    describe,
    enable_gradient_checkpointing,
    export_adapter,
    export_merged,
    stop_token_ids,
    weights_hash,
)
from falign.models.dropout import disable_dropout
from falign.models.tokenizers import pad_token_id
from falign.objectives import Objective
from falign.references import Reference, check_same_at_start
from falign.rollouts.answers import answer
from falign.scoring import LAYOUTS, Layout, check_head, choose_layout
from falign.training.config import RunConfig
from falign.training.curves import plot_curves
from falign.training.progress import BAR, MetricsFile, ProgressBar
from falign.training.references import build_reference, cached, keep_moved, starts_as_policy
from falign.training.run_folder import RunFolder, versions
from falign.training.trainer import AlignmentTrainer

__all__ = ["RunSummary", "train"]


class RunSummary(NamedTuple):
    """What a run achieved.

    Attributes:
        folder: Where everything lies.
        before: Held-out metrics before the first step; empty without evaluation data.
        after: The same after the last step.
        samples: ``prompt``, ``before`` and ``after`` of each prompt of the run file.
    """

    folder: RunFolder
    before: dict[str, float]
    after: dict[str, float]
    samples: list[dict[str, str]]


class Parts(NamedTuple):
    """All that a trainer needs, loaded and checked."""

    policy: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: frozenset[int]
    data: PreferenceData
    objective: Objective


def train(config: RunConfig, *, console: Console | None = None, resume: bool = False) -> RunSummary:
    """Run what a run file describes.

    Args:
        config: The run.
        console: Where progress is shown.
        resume: Go on from the newest checkpoint of the same run.

    Raises:
        FalignError: Something of the run cannot work; nothing was trained, or what was written stays.
    """
    console = console or Console(stderr=True)
    objective, folder = config.check(), RunFolder(config.output_dir)
    if resume:
        folder.require_same(config)
    else:
        folder.require_free()
    set_seed(config.seed)
    parts = _load(config, objective, console)
    if resume:
        checkpoint = folder.last_checkpoint()
        folder.forget_after(int(checkpoint.name.rpartition("-")[2]))
    else:
        checkpoint = None
    bar = ProgressBar(console)
    trainer = _trainer(config, parts, folder, bar, console)
    if checkpoint is None:
        folder.claim(config)  # not before all of the run is known to start
    _record(folder, config, parts, trainer)

    if checkpoint is None:
        before = {"metrics": _evaluate(trainer), "answers": _answers(config, parts)}
        folder.write_json("before.json", before)
    before = folder.read_json("before.json")
    try:
        if checkpoint is not None and trainer.ended_at(checkpoint):
            trainer.take_up(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        bar.close()
    after = _evaluate(trainer)
    samples = [
        {"prompt": prompt, "before": first, "after": last}
        for prompt, first, last in zip(config.sampling.prompts, before["answers"], _answers(config, parts), strict=True)
    ]
    _write_model(folder, parts)
    keep_moved(folder, trainer.reference, parts.policy)
    folder.write_json("samples.json", samples)
    folder.write_json("summary.json", {"before": before["metrics"], "after": after})
    title = f"{config.objective.divergence}, β = {config.objective.beta:g}, {config.model.path}"
    plot_curves(folder.metrics(), folder.path / "curves.png", title=title)
    return RunSummary(folder, before["metrics"], after, samples)


def _load(config: RunConfig, objective: Objective, console: Console) -> Parts:
    """Data first: a bad row is found before any weight is loaded."""
    tokenizer = config.model.build_tokenizer()
    stops = stop_token_ids(config.model.path, tokenizer, revision=config.model.revision)
    with console.status("reading data"):
        data = config.data.build(tokenizer, stop_token_ids=stops, seed=config.seed)
    _check_preferences(data, objective)
    _tell(data, console)
    with console.status(f"loading {config.model.path}"):
        policy: PreTrainedModel | PeftModel = config.model.build()
        _check_fits(config, policy)
        disable_dropout(policy)
        if config.adapter is not None:
            policy = config.adapter.build(policy, seed=config.seed, revision=config.model.revision)
        if config.training.gradient_checkpointing:
            enable_gradient_checkpointing(policy)
        first = data.train[0]
        check_head(policy, first.prompt_ids + first.completion_ids[0])
    return Parts(policy, tokenizer, stops, data, objective)


def _check_preferences(data: PreferenceData, objective: Objective) -> None:
    if "preference" not in objective.needs:
        return
    for tree in (*data.train, *data.eval):
        if len(set(tree.preference or ())) < 2:
            raise DataError(
                f"{tree.place}: no completion is preferred to another, which this objective needs: give chosen and "
                "rejected, or completions with different scores."
            )


def _check_fits(config: RunConfig, model: PreTrainedModel) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and config.data.max_length > positions:
        raise ConfigError(
            f"data.max_length={config.data.max_length} is more than the {positions} positions of {config.model.path}: "
            "lower it."
        )
    if config.adapter is None and model.dtype in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"adapter=null trains all weights, and these are {str(model.dtype).removeprefix('torch.')}, where most "
            "updates are below rounding and lost: set model.dtype=float32, or add an adapter."
        )


def _check_budget(config: RunConfig, data: PreferenceData) -> None:
    budget, longest = config.training.tokens_per_batch, max(data.train, key=lambda tree: tree.num_tokens)
    if budget is not None and longest.num_tokens > budget:
        raise ConfigError(
            f"training.tokens_per_batch={budget} is less than the {longest.num_tokens} tokens of {longest.place} with "
            "its completions: raise it, or lower data.max_length."
        )


def _tell(data: PreferenceData, console: Console) -> None:
    """One line on what became of the rows; the manifest has all of it."""
    report = data.report
    parts = [f"{report.num_train} rows to train on, {report.num_eval} held out"]
    for source in (*report.sources, *report.eval_sources):
        parts += [f"{label} {count}" for label, count in source.counts()[1:] if count and label != "rows kept"]
    console.print("data: " + "; ".join(parts), highlight=False, markup=False)
    if report.shared_prompts:
        console.print(
            f"warning: {report.shared_prompts} held-out prompts also occur in training, so held-out values flatter.",
            style="yellow",
        )


def _trainer(
    config: RunConfig, parts: Parts, folder: RunFolder, bar: ProgressBar, console: Console
) -> AlignmentTrainer:
    args = config.training.build(config.output_dir, seed=config.seed)
    _check_budget(config, parts.data)
    if args.n_gpu > 1:
        raise ConfigError(f"{args.n_gpu} GPUs are visible and one process uses one: set CUDA_VISIBLE_DEVICES=0.")
    reference = build_reference(config, parts.policy, device=args.device)
    pad_id = pad_token_id(parts.tokenizer)
    parts.policy.to(args.device)  # pyright: ignore[reportArgumentType]
    layout = _layout(config, parts, pad_id, console)
    if starts_as_policy(config):
        probe = LAYOUTS[layout](parts.data.train[:2], pad_token_id=pad_id).to(args.device)
        check_same_at_start(parts.policy, reference, probe)
    if config.reference.cache is not None and parts.objective.token_divergence is not None:
        console.print(
            "reference.cache is not used: this objective needs the reference's whole distributions, computed live.",
            style="yellow",
        )
    elif config.reference.cache is not None:
        reference = _cache(config, parts, reference, layout, console)
    trainer = AlignmentTrainer(
        parts.policy,
        reference=reference,
        objective=parts.objective,
        args=args,
        train_trees=parts.data.train,
        eval_trees=parts.data.eval,
        pad_token_id=pad_id,
        layout=layout,
        tokens_per_batch=config.training.tokens_per_batch,
        chunk_tokens=config.training.chunk_tokens,
        processing_class=parts.tokenizer,
        callbacks=[MetricsFile(folder.metrics_file), bar],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _layout(config: RunConfig, parts: Parts, pad_id: int, console: Console) -> Layout:
    """Try the longest trees that have several completions, where a wrong mask shows."""
    trees = sorted(parts.data.train, key=lambda tree: (len(tree.completion_ids) > 1, tree.num_tokens))[-2:]
    try:
        choice = choose_layout(parts.policy, trees, pad_token_id=pad_id, wanted=config.training.layout)
    except ValueError as error:
        raise ConfigError(f"training.{error}") from error
    console.print(
        f"layout: {choice.layout}, {choice.reason}",
        style=None if choice.as_asked else "yellow",
        highlight=False,
        soft_wrap=True,
    )
    return choice.layout


def _cache(config: RunConfig, parts: Parts, reference: Reference, layout: Layout, console: Console) -> Reference:
    assert config.reference.cache is not None
    with Progress(*BAR, console=console, transient=True) as progress:
        task = progress.add_task("reference", total=None)
        return cached(
            reference,
            parts.policy,
            parts.tokenizer,
            [*parts.data.train, *parts.data.eval],
            directory=config.reference.cache,
            batch_size=config.training.per_device_eval_batch_size,
            layout=layout,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _evaluate(trainer: AlignmentTrainer) -> dict[str, float]:
    """Held-out means at this step, without the ``eval_`` of the logs; not computed twice."""
    if not trainer.eval_dataset:
        return {}
    for log in reversed(trainer.state.log_history):
        if log["step"] == trainer.state.global_step and "eval_loss" in log:
            break
    else:
        log = trainer.evaluate()
    return {name.removeprefix("eval_"): value for name, value in log.items() if name.startswith("eval_")}


def _answers(config: RunConfig, parts: Parts) -> list[str]:
    return answer(
        parts.policy,
        parts.tokenizer,
        config.sampling.prompts,
        stop_token_ids=parts.stop_tokens,
        max_new_tokens=config.sampling.max_new_tokens,
        temperature=config.sampling.temperature,
        seed=config.seed,
    )


def _record(folder: RunFolder, config: RunConfig, parts: Parts, trainer: AlignmentTrainer) -> None:
    manifest: dict[str, Any] = {
        "versions": versions(),
        "model": asdict(describe(parts.policy)),
        "base_weights": weights_hash(parts.policy),
        "reference": trainer.reference.identity(),
        "layout": trainer.layout,
        "objective": config.objective.model_dump(),
        "data": asdict(parts.data.report),
    }
    folder.write_json("manifest.json", manifest)


def _write_model(folder: RunFolder, parts: Parts) -> None:
    if isinstance(parts.policy, PeftModel):
        export_adapter(parts.policy, parts.tokenizer, folder.adapter, overwrite=True)
    else:
        export_merged(parts.policy, parts.tokenizer, folder.weights, overwrite=True)
