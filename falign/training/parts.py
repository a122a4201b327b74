"""The parts that every run loads, offline and online: tokenizer, policy, references and scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from falign.data.other_prompts import OtherPrompts
from falign.errors import ConfigError
from falign.models import (
    base_of,
    config_hash,
    describe,
    enable_gradient_checkpointing,
    load_tokenizer,
    weights_hash,
)
from falign.models.base_weights import base_storage
from falign.models.execution import disable_dropout
from falign.models.heads import head_rows, left_out_rows
from falign.models.sharding import shard
from falign.models.structure import expert_modules, lora_layers
from falign.models.tokenizers import check_same_tokens, pad_token_id
from falign.objectives import Objective, token_weighting
from falign.references import REFERENCE, Reference, check_same_at_start
from falign.runfile.config import RunConfig
from falign.scoring import PromptTree, Scorer, check_head, choose_layout
from falign.training.master_weights import share_below_rounding
from falign.training.processes import shards
from falign.training.references import build_references

__all__ = ["Language", "Parts", "load_language", "load_parts"]

START_ROWS = 256
"""Rows of the training data from which an adapter starts, if its start reads any."""


class Language(NamedTuple):
    """Tokenizer and rendering of a run.

    Attributes:
        tokenizer: The model's tokenizer.
        stop_tokens: All ids that end a completion.
        pad_token_id: The id that fills rows.
        date: The date that chat templates write; None is today.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_tokens: frozenset[int]
    pad_token_id: int
    date: datetime | None = None


class Parts(NamedTuple):
    """The models of a run, on their device.

    Attributes:
        policy: The model to train.
        references: The references, by name.
        scorer: A scorer with a layout that all models can read.
        record: The policy before training: its description, and the content hashes of its base weights, of its
            configuration and of the references' configurations.
    """

    policy: PreTrainedModel | PeftModel
    references: dict[str, Reference]
    scorer: Scorer
    record: dict[str, Any]


def load_language(config: RunConfig, *, date: datetime | None = None) -> Language:
    """Load the tokenizer, which reading the data needs; weights follow later, after the data are checked.

    Args:
        config: The run.
        date: The date that chat templates write; None is today.

    Raises:
        ConfigError: Another model of the run has a tokenizer with other token ids.
    """
    tokenizer = config.model.build_tokenizer(date=date)
    for field, path in config.models_that_read_ids():
        check_same_tokens(tokenizer, load_tokenizer(path), f"model.path={config.model.path} and {field}={path}")
    stops = config.model.stop_token_ids(tokenizer)
    return Language(tokenizer, stops, pad_token_id(tokenizer), date)


def load_parts(
    config: RunConfig,
    language: Language,
    objective: Objective,
    args: TrainingArguments,
    *,
    make_probes: Callable[[nn.Module], Sequence[PromptTree]],
    first_rows: Callable[[], Sequence[Sequence[int]]],
    longest: int,
    prompts: Mapping[str, OtherPrompts],
    console: Console,
) -> Parts:
    """Load policy and references, choose the layout, and check all of them on a few prompt trees.

    Args:
        config: The run.
        language: Its tokenizer.
        objective: The objective to minimize.
        args: Training arguments, for the device.
        make_probes: Returns prompt trees to test layouts and references on, those with most completions last; it may
            sample them from the policy.
        first_rows: Returns token ids of rows of the training data, for adapters that start from them.
        longest: Number of tokens of the longest possible prompt with its completion.
        prompts: The rows' other prompts, for each reference that has a prompt of its own.
        console: Shows the results of the checks.

    Raises:
        ConfigError: The run file does not fit the model.
        ModelError: Policy and reference differ although the reference starts as the policy.
    """
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs are visible, and a process uses one: set CUDA_VISIBLE_DEVICES=0, or start one process "
            f"per GPU (falign train RUN.yaml --launch ddp --processes {args.n_gpu})."
        )
    with console.status(f"loading {config.model.path}"):
        policy: PreTrainedModel | PeftModel = config.model.build(trains=config.adapter is None)
        _check_fits(config, policy, longest, partial(console.print, style="yellow", highlight=False, soft_wrap=True))
        disable_dropout(policy)
        if config.adapter is not None:
            tokens = config.model.new_token_ids()
            policy = config.adapter.build(policy, seed=config.seed, revision=config.model.revision, token_ids=tokens)
        if config.training.gradient_checkpointing:
            enable_gradient_checkpointing(policy)
        if not shards():
            policy.to(args.device)  # pyright: ignore[reportArgumentType]
        if config.adapter is not None and config.adapter.starts_from_rows:
            assert isinstance(policy, PeftModel)
            config.adapter.start_from(policy, first_rows()[:START_ROWS], pad_token_id=language.pad_token_id)
        device = torch.device("cpu") if shards() else args.device
        references = build_references(config, policy, language.tokenizer, device=device, prompts=prompts)
        for name, reference in references.items():
            reference.check_length(longest, place=config.section_of(name))
        # Hashed before sharding, which separates 4-bit weights from their scales.
        own = {name: reference.own_model for name, reference in references.items()}
        configs: dict[str, str] = {
            name: config_hash(policy if model is None else model)  # pyright: ignore[reportArgumentType]
            for name, model in own.items()
        }
        record = {
            "model": asdict(describe(policy)),
            "base_weights": weights_hash(policy),
            "base_storage": base_storage(policy),
            "base_config": config_hash(policy),
            "reference_config": configs.pop(REFERENCE, None),
            **({"reference_configs": configs} if configs else {}),
        }
        if shards():
            for model in (policy, *own.values()):
                if model is not None:
                    shard(model, device=args.device)  # pyright: ignore[reportArgumentType]
        probes = make_probes(policy)
        check_head(policy, probes[0].prompt_ids + probes[0].completion_ids[0])
        _report_experts(policy, console)
        _report_left_out_rows(policy, console)
    scorer = _scorer(config, policy, probes, language.pad_token_id, console)
    batch = scorer.lay_out(probes[:2], model=policy)
    for reference in references.values():
        if reference.starts_as_policy:
            check_same_at_start(policy, reference, batch)
    if (weighting := token_weighting(objective.needs)) not in ("none", "data"):
        # Called once here, so that a model without token weights is refused before training.
        references[REFERENCE].states(policy, batch, weighting=weighting)
    return Parts(policy, references, scorer, record)


def _report_experts(policy: PreTrainedModel | PeftModel, console: Console) -> None:
    if not isinstance(policy, PeftModel) or not (experts := expert_modules(base_of(policy))):
        return
    trained = [name for name in lora_layers(policy, "default") if any(name.startswith(each) for each in experts)]
    said = f"adapter: {len(experts)} modules hold experts (first: {experts[0]}). "
    if trained:
        said += f"The adapter changes {len(trained)} of their parameters; their routers are not trained."
    else:
        said += (
            "They and their routers are not linear layers and are not trained; adapter.target_parameters names "
            "parameters of experts."
        )
    console.print(said, style=None if trained else "yellow", highlight=False, soft_wrap=True)


def _report_left_out_rows(policy: PreTrainedModel | PeftModel, console: Console) -> None:
    if left_out := left_out_rows(policy):
        rows = head_rows(policy)
        console.print(
            f"head: the policy has {rows + left_out} rows and the reference {rows}, so both distributions are over the "
            f"first {rows} ids. Exports and `falign sample` have logits for all {rows + left_out} again.",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def _check_fits(config: RunConfig, model: PreTrainedModel, longest: int, tell: Callable[[str], None]) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and longest > positions:
        field = "data.max_length" if config.data is not None else "prompts.max_length + rollout.max_new_tokens"
        raise ConfigError(f"{field}={longest} is more than the {positions} positions of {config.model.path}: lower it.")
    stored = describe(model).quantization
    if config.adapter is None and stored is not None:
        raise ConfigError(
            f"adapter=null trains all weights, and those of {config.model.path} are stored quantized ({stored}), which "
            "cannot be trained: add an adapter, or give the 16-bit model."
        )
    if stored == "int8" and shards():
        raise ConfigError(
            "model.quantization=int8 under FSDP2: integers are not sharded. Train with DDP (--launch ddp), or set "
            "model.quantization=nf4."
        )
    if config.adapter is None:
        _check_precision(config, model, tell)


def _check_precision(config: RunConfig, model: PreTrainedModel, tell: Callable[[str], None]) -> None:
    """Refuse or report weights of a precision in which small updates are lost."""
    masters, dtype = config.training.master_weights is not None, str(model.dtype).removeprefix("torch.")
    if model.dtype == torch.float16:
        raise ConfigError(
            "adapter=null trains all weights, and these are float16, whose range does not hold small gradients: set "
            "model.dtype=bfloat16 and training.master_weights=float32, or model.dtype=float32, or add an adapter."
        )
    if masters and model.dtype != torch.bfloat16:
        raise ConfigError(
            f"training.master_weights=float32 has no effect on {dtype} weights: set model.dtype=bfloat16, or leave "
            "it out."
        )
    if masters and shards():
        raise ConfigError(
            "training.master_weights=float32 under FSDP2: whole copies of the weights are not sharded. Train with DDP "
            "(--launch ddp), or set model.dtype=float32."
        )
    if model.dtype == torch.bfloat16 and not masters:
        rate = config.training.learning_rate
        share = share_below_rounding(model.parameters(), rate)
        tell(
            f"warning: adapter=null trains all weights in bfloat16. A step of training.learning_rate={rate:g} is lost "
            f"to rounding in {share:.1%} of the weights of {config.model.path} (measured now). Set "
            "training.master_weights=float32, which keeps their sum, or model.dtype=float32."
        )


def _scorer(
    config: RunConfig, policy: PreTrainedModel | PeftModel, probes: Sequence[PromptTree], pad_id: int, console: Console
) -> Scorer:
    """Choose the layout on trees with several completions, where a wrong mask changes the scores."""
    try:
        choice = choose_layout(policy, list(probes)[-2:], pad_token_id=pad_id, wanted=config.training.layout)
    except ValueError as error:
        raise ConfigError(f"training.{error}") from error
    console.print(
        f"layout: {choice.layout}, {choice.reason}",
        style=None if choice.as_requested else "yellow",
        highlight=False,
        soft_wrap=True,
    )
    return Scorer(choice.layout, pad_id, config.training.chunk_tokens)
