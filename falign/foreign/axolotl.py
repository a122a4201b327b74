"""Configurations of axolotl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from falign.errors import ConfigError
from falign.foreign.axolotl_data import eval_sources, train_sources
from falign.foreign.axolotl_rows import AXOLOTL, DEFAULTS
from falign.foreign.reasons import INT8
from falign.foreign.rows import Value
from falign.foreign.shared import (
    as_list,
    best_model,
    default_targets,
    launch_of,
    mapping_of,
    new_tokens,
    weighted_terms,
)
from falign.foreign.translation import Translation
from falign.foreign.trl import WITHOUT_COUNTERPART

__all__ = ["translated"]

METHODS = {
    "orpo": "ORPO is defined without a reference, which preference objectives of falign have",
    "simpo": "SimPO is defined without a reference, which preference objectives of falign have",
    "gdpo": "each reward would be normalized by itself; the reward here is the sum of all, times their weights",
    "ebft": "energy-based fine-tuning is not available",
}
ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
    "flex_attention": "flex_attention",
}
TRACKERS = {
    "use_wandb": "wandb",
    "use_mlflow": "mlflow",
    "use_comet": "comet_ml",
    "use_tensorboard": "tensorboard",
    "use_trackio": "trackio",
}
FAST_PLUGINS = ("liger", "cut_cross_entropy")
REDUCTIONS = {"grpo": "sequence_mean", "dapo": "token_mean", "bnpo": "token_mean", "dr_grpo": "sequence_sum"}


def translated(given: dict[str, Value], *, command: str | None, folder: Path, processes: int | None) -> Translation:
    """Return the translation of a configuration of axolotl.

    Args:
        given: The settings, as in the file of ``axolotl train``.
        command: Must be None: the setting ``rl`` is the method.
        folder: The folder of the file.
        processes: Number of processes of their run.

    Raises:
        ConfigError: Settings are unknown, invalid or have no counterpart.
    """
    if command is not None:
        raise ConfigError(f"--method {command}: in axolotl the setting rl is the method; leave it out.")
    inner = {f"trl.{name}": value for name, value in mapping_of(given.get("trl") or {}, "trl").items()}
    run = Translation("axolotl", "axolotl", {**given, **inner}, DEFAULTS, AXOLOTL, sections=frozenset({"trl"}))
    run.require_known()
    run.apply_rows()
    _ = run["trl"]
    if run["learning_rate"] is None:
        run.refuse("learning_rate", "axolotl requires it")
    method = run["rl"] or ("reward" if run["reward_model"] else "sft")
    if method in METHODS or method not in ("dpo", "ipo", "kto", "grpo", "sft", "reward"):
        run.refuse("rl", METHODS.get(method, "choose one of dpo, ipo, kto, grpo, or leave it out for fine-tuning"))
    _model(run)
    _adapter(run)
    launch_of(
        run, fsdp=run["fsdp"] or run["fsdp_config"], deepspeed=run["deepspeed"], processes=processes, folder=folder
    )
    _training(run)
    if method == "grpo":
        _grpo(run)
    else:
        _offline(run, method)
    run.finish()
    return run


def _model(run: Translation) -> None:
    for name in ("base_model_config", "tokenizer_config"):
        if run[name] not in (None, run["base_model"]):
            run.refuse(name, "configuration and tokenizer are those of model.path")
    if run["fp16"] or run["float16"]:
        run.refuse("fp16" if run["fp16"] else "float16", "float16 needs a scaled loss; use bf16, or leave it out")
    if run["float32"] or (run["bf16"] is False and not run["bfloat16"]):
        run.put("model.dtype", "float32", "float32", "bf16")
    elif run["bf16"] == "auto" and not run["bfloat16"]:
        run.put("model.dtype", "fastest", "bf16")
    else:
        run.put("model.dtype", "bfloat16", "bf16", "bfloat16")
    chosen = [kind for name, kind in ATTENTION.items() if run[name]]
    attention = run["attn_implementation"] or (chosen[0] if chosen else None)
    if run["xformers_attention"]:
        run.refuse("xformers_attention", "choose flash_attention, sdp_attention, flex_attention or eager_attention")
    if attention is not None:
        run.put("model.attn_implementation", attention, "attn_implementation", *ATTENTION)
    special = mapping_of(run["special_tokens"] or {}, "special_tokens")
    if other := sorted(special.keys() - {"pad_token"}):
        run.refuse("special_tokens", f"{other[0]} is that of the tokenizer; save a model with it first")
    new_tokens(run, "tokens")
    template = run["chat_template"]
    if template not in (None, "tokenizer_default", "jinja") and not str(template).startswith("tokenizer_default"):
        run.differ(
            f"turns are rendered by the tokenizer's chat template, which should be axolotl's template {template}; set "
            "model.chat_template if it is another."
        )
    for plugin in as_list(run["plugins"]):
        if not any(word in plugin for word in FAST_PLUGINS):
            run.refuse("plugins", f"{plugin} may change the run, and falign has no plugins")


def _adapter(run: Translation) -> None:
    kind = run["adapter"]
    if run["load_in_4bit"]:
        run.put("model.quantization", "nf4", "load_in_4bit", "adapter")
    if run["load_in_8bit"]:
        run.put("model.quantization", "int8", "load_in_8bit")
        run.differ(INT8)
    if kind is None:
        run.put("adapter", None, "adapter")
        return
    if kind not in ("lora", "qlora"):
        run.refuse("adapter", "adapters are LoRA: lora or qlora")
    if run["lora_r"] is None or run["lora_alpha"] is None:
        run.refuse("lora_r" if run["lora_r"] is None else "lora_alpha", "axolotl has no default; set it")
        return
    targets = as_list(run["lora_target_modules"])
    if run["lora_target_linear"] or targets == ["all-linear"]:
        if targets and targets != ["all-linear"]:
            run.refuse("lora_target_modules", "beside lora_target_linear, which names all linear modules already")
        found: list[str] | str = "all-linear"
    elif targets:
        found = targets
    else:
        try:
            found = default_targets(
                run["base_model"], revision=run["revision_of_model"], trust_remote_code=bool(run["trust_remote_code"])
            )
        except ConfigError as error:
            run.refuse("lora_target_modules", str(error))
            return
    run.put("adapter.r", run["lora_r"], "lora_r", "adapter")
    run.put("adapter.alpha", run["lora_alpha"], "lora_alpha")
    run.put("adapter.dropout", run["lora_dropout"] or 0.0, "lora_dropout")
    run.put("adapter.target_modules", found, "lora_target_modules", "lora_target_linear")
    _kind_of_lora(run)


def _kind_of_lora(run: Translation) -> None:
    for name in ("use_rslora", "use_dora"):
        if run[f"peft_{name}"]:
            run.put(f"adapter.{name}", True, f"peft_{name}")
    for name in ("modules_to_save", "target_parameters"):
        if given := as_list(run[f"lora_{name}"]):
            run.put(f"adapter.{name}", given, f"lora_{name}")
    if (start := run["peft_init_lora_weights"]) not in (None, True):
        run.put("adapter.init_lora_weights", start, "peft_init_lora_weights")


def _training(run: Translation) -> None:
    micro, accumulated, total = run["micro_batch_size"], run["gradient_accumulation_steps"], run["batch_size"]
    if total is not None and not run.is_given("gradient_accumulation_steps"):
        share = micro * (run.launch.processes or 1)
        if total % share:
            run.refuse("batch_size", f"it is not a multiple of micro_batch_size times processes, {share}")
        accumulated = max(1, total // share)
    run.put("training.per_device_train_batch_size", micro, "micro_batch_size")
    run.put("training.gradient_accumulation_steps", accumulated, "gradient_accumulation_steps", "batch_size")
    run.put(
        "training.per_device_eval_batch_size", run["eval_batch_size"] or micro, "eval_batch_size", "micro_batch_size"
    )
    if run["max_steps"]:
        run.put("training.max_steps", run["max_steps"], "max_steps")
    if run["lr_scheduler"] in ("one_cycle", "rex"):
        run.refuse("lr_scheduler", "training.lr_scheduler_type has the schedules of transformers")
    run.put("training.lr_scheduler_type", run["lr_scheduler"] or "cosine", "lr_scheduler")
    _warm_up(run)
    if (every := run["save_steps"]) and every >= 1:
        run.put("training.save_steps", int(every), "save_steps")
    else:
        run.unused["save_strategy"] = "training.save_steps counts steps; no checkpoints are written until it is set"
    if (every := run["eval_steps"]) and every >= 1:
        run.put("training.eval_steps", int(every), "eval_steps")
    elif run.is_given("eval_steps", "eval_strategy"):
        _ = run["eval_strategy"]
        run.unused["eval_strategy"] = "training.eval_steps counts steps; evaluation comes first and last anyway"
    if run["logging_steps"]:
        run.put("training.logging_steps", run["logging_steps"], "logging_steps")
    if run["gradient_checkpointing"]:
        run.put("training.gradient_checkpointing", True, "gradient_checkpointing")
    trackers = [tracker for name, tracker in TRACKERS.items() if run[name]]
    if trackers:
        run.put("training.report_to", trackers, *TRACKERS)
    best_model(run, patience=run["early_stopping_patience"])
    if run["curriculum_sampling"]:
        run.put("training.extra.train_sampling_strategy", "sequential", "curriculum_sampling")


def _warm_up(run: Translation) -> None:
    """Write axolotl's warm-up: 3 % of the steps and at most 100 by default; a warm-up of one step is made two."""
    steps, share, total = run["warmup_steps"], run["warmup_ratio"], run["max_steps"]
    if steps:
        value: float = steps
    elif total:
        value = int(share * total) if share else min(int(0.03 * total), 100)
    else:
        value = share or 0.03
        if not share:
            run.differ("the warm-up is 3 % of all steps; axolotl takes at most 100 steps (warmup_ratio).")
    run.put("training.warmup_steps", 2 if value == 1 else value, "warmup_steps", "warmup_ratio")


def _offline(run: Translation, method: str) -> None:
    run.put("data.train", train_sources(run, method), "datasets")
    held = eval_sources(run, method)
    if held:
        run.put("data.eval", held, "test_datasets")
    if size := run["val_set_size"]:
        field, value = ("eval_size", int(size)) if size >= 1 else ("eval_fraction", float(size))
        run.put(f"data.{field}", value, "val_set_size")
    run.put("data.max_length", run["sequence_len"], "sequence_len")
    kind = run["excess_length_strategy"]
    if kind not in ("drop", "truncate", "raise"):
        run.refuse("excess_length_strategy", "choose drop, truncate or raise")
    prompt, completion = {"truncate": ("drop", "cut"), "raise": ("error", "error")}.get(kind, ("drop", "drop"))
    run.put("data.long_prompt", prompt, "excess_length_strategy", "sequence_len")
    run.put("data.long_completion", completion, "excess_length_strategy", "sequence_len")
    {"sft": _sft, "kto": _kto, "reward": _reward}.get(method, _dpo)(run)


def _sft(run: Translation) -> None:
    run.put("objective", {"kind": "supervised"}, "rl")
    run.differ(
        "the loss counts the last answer of a conversation; axolotl trains on all of them unless told otherwise."
    )


def _reward(run: Translation) -> None:
    centering = run["center_rewards_coefficient"] or 0.0
    run.put("objective", {"kind": "reward_model", "centering": centering}, "reward_model", "center_rewards_coefficient")


def _beta(run: Translation) -> float:
    return next((run[name] for name in ("trl.beta", "rl_beta", "dpo_beta") if run[name] is not None), 0.1)


def _kto(run: Translation) -> None:
    weights = {
        "desirable_weight": run["kto_desirable_weight"] or 1.0,
        "undesirable_weight": run["kto_undesirable_weight"] or 1.0,
    }
    run.put(
        "objective",
        {"kind": "unpaired", "beta": _beta(run), **weights},
        "rl",
        "rl_beta",
        "kto_desirable_weight",
        "kto_undesirable_weight",
    )
    run.differ("KTO's reference point is a mean over all rows of an optimizer step, there over a micro-batch.")


def _dpo(run: Translation) -> None:
    losses = as_list(run["dpo_loss_type"]) or ["ipo" if run["rl"] == "ipo" else "sigmoid"]
    weights = [float(each) for each in as_list(run["dpo_loss_weights"])] or [1.0] * len(losses)
    if len(weights) != len(losses):
        raise ConfigError(f"dpo_loss_weights has {len(weights)} numbers, and dpo_loss_type {len(losses)} losses.")
    smoothing, beta = run["dpo_label_smoothing"] or 0.0, _beta(run)
    margins = {
        "sigmoid": "logistic",
        "hinge": "hinge",
        "robust": f"robust({smoothing:g})",
        "ipo": "ipo",
        "exo_pair": f"exo({smoothing:g})",
        "sigmoid_norm": "logistic",
    }
    if smoothing and "sigmoid" in losses:
        run.differ(
            "TRL's sigmoid loss ignores label smoothing since 1.0, and so does this run file; objective.margin_loss: "
            f"conservative({smoothing:g}) smooths, as older releases did (dpo_label_smoothing)."
        )
    terms: list[tuple[str, dict[str, Any], float]] = []
    for loss, weight in zip(losses, weights, strict=True):
        if loss == "sft":
            terms.append(("sft", {"kind": "supervised", "completions": "chosen"}, weight))
        elif loss in margins:
            section = {"kind": "pairwise", "beta": beta, "margin_loss": margins[loss]}
            by_token = {"length_norm": "token"} if loss in ("ipo", "sigmoid_norm") else {}
            terms.append((loss, {**section, **by_token}, weight))
        else:
            run.refuse("dpo_loss_type", f"{loss}: {WITHOUT_COUNTERPART.get(loss, 'it is not a loss of trl dpo')}")
    if run["rpo_alpha"]:
        terms.append(("sft", {"kind": "supervised", "completions": "chosen"}, float(run["rpo_alpha"])))
    names = ("rl", "rl_beta", "dpo_beta", "dpo_loss_type", "dpo_loss_weights", "dpo_label_smoothing", "rpo_alpha")
    run.put("objective", weighted_terms(terms) if terms else {}, *names)


def _grpo(run: Translation) -> None:
    for name, other in (("datasets", "prompts.train"), ("test_datasets", "prompts.eval")):
        if run[name]:
            run.put(other, [_prompts(run, name, mapping_of(each, name)) for each in run[name]], name)
    if size := run["val_set_size"]:
        if size < 1:
            run.refuse("val_set_size", "prompts.eval_size is a number of prompts")
        run.put("prompts.eval_size", int(size), "val_set_size")
    run.put("prompts.max_length", run["max_prompt_len"], "max_prompt_len")
    _rollouts(run)
    _rewards(run)
    loss = run["trl.loss_type"]
    if loss not in REDUCTIONS:
        run.refuse("trl.loss_type", f"choose one of {', '.join(REDUCTIONS)}")
    if run["trl.importance_sampling_level"] != "token":
        run.refuse("trl.importance_sampling_level", "GSPO's weight of a completion is a geometric mean of its tokens'")
    if run["trl.use_vllm"]:
        run.differ("vLLM is the server of docs/vllm.md; without the section rollout.engine transformers sample.")
    scaled = run["trl.scale_rewards"] in (True, "group")
    low, high, beta = run["trl.epsilon"], run["trl.epsilon_high"], run["trl.beta"] or 0.0
    section: dict[str, Any] = {"kind": "policy_gradient", "importance": "token"}
    section |= {"advantage": "group_normalised" if scaled else "group_centred", "clip_low": low}
    section |= {"clip_high": low if high is None else high, "reduction": REDUCTIONS.get(loss, "token_mean")}
    if beta:
        section |= {"divergence": "reverse_kl", "beta": beta, "level": "token"}
        if run["trl.sync_ref_model"]:
            every, alpha = run["trl.ref_model_sync_steps"], run["trl.ref_model_mixup_alpha"]
            run.put("reference", {"kind": "moving_average", "alpha": alpha, "every": every}, "trl.sync_ref_model")
    weight = 1 / run["trl.max_completion_length"] if loss == "dr_grpo" else 1.0
    run.put("objective", weighted_terms([("grpo", section, weight)]), "trl.loss_type", "trl.beta", "trl.epsilon")


def _prompts(run: Translation, name: str, source: Mapping[str, Any]) -> dict[str, Any]:
    if source.get("type"):
        run.refuse(
            name, f"the function {source['type']} changes rows; write them with a column prompt, or use template"
        )
    if rest := sorted(source.keys() - {"path", "split", "type"}):
        run.refuse(name, f"{rest[0]} of a source; prompts.train has path, split, template and columns")
    return {"path": source["path"], "split": source.get("split") or "train", "chat": False}


def _rollouts(run: Translation) -> None:
    micro, accumulated, group = run["micro_batch_size"], run["gradient_accumulation_steps"], run["trl.num_generations"]
    processes = run.launch.processes or 1
    total = run["trl.generation_batch_size"] or micro * processes * (run["trl.steps_per_generation"] or accumulated)
    step = micro * processes * accumulated
    if total % group or total % step or total // step > total // group:
        run.refuse("trl.num_generations", f"{total} completions are not a whole number of prompts and steps of {step}")
        return
    run.put("rollout.prompts", total // group, "trl.num_generations", "micro_batch_size", "gradient_accumulation_steps")
    run.put("rollout.completions", group, "trl.num_generations")
    run.put("rollout.minibatches", total // step, "trl.steps_per_generation")
    run.put("rollout.updates", run["trl.num_iterations"], "trl.num_iterations")
    run.put("rollout.max_new_tokens", run["trl.max_completion_length"], "trl.max_completion_length")
    run.put("training.per_device_train_batch_size", max(1, math.ceil(micro / group)), "micro_batch_size")
    run.put("training.gradient_accumulation_steps", 1)
    if run["trl.temperature"] != 1:
        run.refuse("trl.temperature", "TRL trains the distribution at this temperature, falign the one at 1")


def _rewards(run: Translation) -> None:
    names, weights = as_list(run["trl.reward_funcs"]), run["trl.reward_weights"]
    if not names or (weights is not None and len(weights) != len(names)):
        run.refuse("trl.reward_funcs", "a run needs a reward, module.function, and as many weights as rewards")
        return
    found = []
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        module, _, function = name.rpartition(".")
        if not module:
            run.refuse("trl.reward_funcs", f"{name} is not module.function")
        found.append({"kind": "function", "function": f"{module}:{function}", "form": "trl", "weight": float(weight)})
    run.put("rewards", found, "trl.reward_funcs", "trl.reward_weights")
