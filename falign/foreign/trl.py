"""Configurations of TRL's commands on given data: ``trl dpo``, ``trl kto``, ``trl sft`` and ``trl reward``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from falign.errors import ConfigError
from falign.foreign.reasons import INT8
from falign.foreign.shared import (
    as_list,
    best_model,
    default_targets,
    launch_of,
    mapping_of,
    positions,
    schedule_steps,
    weighted_terms,
    zero_stage,
)
from falign.foreign.translation import Launch, Translation

__all__ = ["adapter_and_model", "alpha_divergence", "positions_of", "processes_and_launch", "sources", "translate"]

DIVERGENCES = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js_divergence": "jensen_shannon"}
PRESETS = {"fsdp1": "fsdp2", "fsdp2": "fsdp2", "zero2": "fsdp2", "zero3": "fsdp2", "zero1": "ddp", "multi_gpu": "ddp"}
"""Launch by the names of TRL's own files for Accelerate; ``single_gpu`` has none."""

WITHOUT_COUNTERPART = {
    "nca_pair": "NCA has a loss of each completion beside that of the pair",
    "bco_pair": "BCO classifies completions by their own reward, without a reference point",
    "sppo_hard": "SPPO pulls each reward to a target of its own",
    "aot": "AOT sorts the log-ratios of a batch, so that the loss of a pair depends on the other pairs",
    "aot_unpaired": "AOT sorts the log-ratios of a batch, so that the loss of a pair depends on the other pairs",
    "apo_down": "APO-down lowers the chosen completions, too",
    "discopop": "DiscoPOP blends two losses by the log-ratio",
}


def translate(run: Translation, command: str, folder: Path) -> None:
    """Translate the settings that depend on each other.

    Args:
        run: The translation, whose rows have been applied.
        command: ``dpo``, ``kto``, ``sft`` or ``reward``.
        folder: The folder of the configuration.
    """
    processes_and_launch(run, folder)
    adapter_and_model(run)
    schedule_steps(run)
    best_model(run)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        run.put(f"training.{name}", run[name], name)
    data, eval_data, held_out = sources(run)
    run.put("data.train", data, "dataset_name", "datasets")
    if eval_data:
        run.put("data.eval", eval_data, "dataset_test_split", "eval_strategy")
    if held_out:
        field, value = ("eval_size", int(held_out)) if held_out >= 1 else ("eval_fraction", held_out)
        run.put(f"data.{field}", value, "test_split_size")
    _window(run)
    OBJECTIVES[command](run)
    if command in ("dpo", "kto"):
        reference(run)


def processes_and_launch(run: Translation, folder: Path) -> None:
    """Translate FSDP, DeepSpeed and Accelerate's options to a launch of ``falign train``."""
    processes = run["num_processes"]
    preset = run["accelerate_config"]
    launch_of(run, fsdp=run["fsdp"], deepspeed=run["deepspeed"], processes=processes, folder=folder)
    _ = run["fsdp_config"]
    if preset is None:
        return
    if preset in PRESETS or preset == "single_gpu":
        run.launch = Launch(PRESETS.get(preset), processes)
        return
    from falign.plain_yaml import plain_yaml

    file = next((each for each in (folder / preset, Path(preset)) if each.is_file()), None)
    if file is None:
        raise ConfigError(f"accelerate_config: no file {preset}, nor a preset of TRL ({', '.join(PRESETS)}).")
    found = mapping_of(plain_yaml(file.read_text(encoding="utf-8"), place=str(file)), str(file))
    kind = str(found.get("distributed_type", "NO"))
    stage = zero_stage({"zero_optimization": {"stage": found.get("deepspeed_config", {}).get("zero_stage", 0)}}, folder)
    shards = kind == "FSDP" or (kind == "DEEPSPEED" and stage >= 2)
    number = processes or found.get("num_processes")
    run.launch = Launch("fsdp2" if shards else "ddp" if number and number > 1 else None, number)


def adapter_and_model(run: Translation) -> None:
    """Translate model, quantization and adapter."""
    init = {} if run["model_init_kwargs"] is None else dict(mapping_of(run["model_init_kwargs"], "model_init_kwargs"))
    if run["model_name_or_path"] is None:
        run.refuse("model_name_or_path", "it is required")
        return
    dtype = init.pop("dtype", init.pop("torch_dtype", run["torch_dtype"] or run["dtype"]))
    attention = init.pop("attn_implementation", run["attn_implementation"])
    revision = init.pop("revision", run["model_revision"])
    remote = bool(init.pop("trust_remote_code", run["trust_remote_code"]))
    _rest_of_init(run, init)
    run.put("model.dtype", str(dtype).removeprefix("torch."), "dtype", "torch_dtype", "model_init_kwargs")
    if attention is not None:
        run.put("model.attn_implementation", attention, "attn_implementation", "model_init_kwargs")
    if revision not in (None, "main"):
        run.put("model.revision", revision, "model_revision", "model_init_kwargs")
    if remote:
        run.put("model.trust_remote_code", True, "trust_remote_code", "model_init_kwargs")
    if run["fp16"]:
        run.refuse("fp16", "float16 needs a scaled loss; use bf16, or leave it out")
    elif run["bf16"] is not False and str(dtype) == "float32":
        run.differ(
            "on a GPU TRL computes in bfloat16 by autocast over float32 weights (bf16); here float32 weights compute "
            "in float32. model.dtype: bfloat16 is faster."
        )
    _quantization(run, str(dtype))
    if not run["use_peft"]:
        run.put("adapter", None, "use_peft")
        return
    _lora(run, revision=revision, remote=remote)


def _rest_of_init(run: Translation, init: dict[str, Any]) -> None:
    for name in {"device_map", "use_cache", "low_cpu_mem_usage"} & init.keys():
        run.unused[f"model_init_kwargs.{name}"] = "it does not change what the model computes"
        init.pop(name)
    if init:
        run.refuse("model_init_kwargs", f"{', '.join(sorted(init))} cannot be set for a model")


def _lora(run: Translation, *, revision: str | None, remote: bool) -> None:
    targets = run["lora_target_modules"]
    if targets is None or targets == []:
        try:
            targets = default_targets(run["model_name_or_path"], revision=revision, trust_remote_code=remote)
        except ConfigError as error:
            run.refuse("lora_target_modules", str(error))
            return
    elif targets not in ("all-linear", ["all-linear"]):
        targets = as_list(targets)
    run.put("adapter.r", run["lora_r"], "lora_r", "use_peft")
    run.put("adapter.alpha", run["lora_alpha"], "lora_alpha")
    run.put("adapter.dropout", run["lora_dropout"], "lora_dropout")
    run.put("adapter.target_modules", "all-linear" if targets == ["all-linear"] else targets, "lora_target_modules")
    for name in ("use_rslora", "use_dora"):
        if run[name]:
            run.put(f"adapter.{name}", True, name)
    for name in ("modules_to_save", "target_parameters"):
        if found := as_list(run[f"lora_{name}"]):
            run.put(f"adapter.{name}", found, f"lora_{name}")


def _quantization(run: Translation, dtype: str) -> None:
    if run["load_in_8bit"]:
        run.put("model.quantization", "int8", "load_in_8bit")
        run.differ(INT8)
    if not run["load_in_4bit"]:
        return
    if run["bnb_4bit_quant_type"] != "nf4":
        run.refuse("bnb_4bit_quant_type", "model.quantization supports nf4 in 4 bits, and int8")
    run.put("model.quantization", "nf4", "load_in_4bit")
    if not run["use_bnb_nested_quant"]:
        run.differ("4-bit weights always have double quantization here (use_bnb_nested_quant: true).")
    if dtype != "bfloat16":
        run.differ(f"4-bit weights compute in bfloat16 here, and in {dtype} there (dtype).")


def sources(run: Translation) -> tuple[list[dict[str, Any]], list[dict[str, Any]], float]:
    """Return training sources, held-out sources, and the share or number of training rows to hold out."""
    given, found = run["datasets"] or [], []
    if not given and run["dataset_name"] is None:
        run.refuse("dataset_name", "it is required, or datasets")
        return [], [], 0.0
    if not given:
        name = run["dataset_name"]
        found = [{"path": name, "split": run["dataset_train_split"], "chat": False}]
        held = run["eval_strategy"] != "no"
        return found, [{"path": name, "split": run["dataset_test_split"], "chat": False}] if held else [], 0.0
    for i, each in enumerate(given):
        source = dict(mapping_of(each, f"datasets.{i}"))
        files, path, kept = source.pop("data_files", None), source.pop("path", None), source.pop("columns", None)
        split = source.pop("split", "train")
        if kept is not None:
            run.unused[f"datasets.{i}.columns"] = "columns that are not read stay"
        unsupported = sorted(name for name, value in source.items() if value is not None)
        if unsupported:
            run.refuse(
                "datasets",
                f"{unsupported[0]} of source {i}; data.train.{i} has path, split, columns, weight and limit",
            )
        for file in [path] if files is None else [files] if isinstance(files, str) else files:
            found.append({"path": file, "split": split, "chat": False})
    return found, [], float(run["test_split_size"] or 0)


def _window(run: Translation) -> None:
    length = run["max_length"]
    older = run["max_prompt_length"]
    run.put("data.max_length", length or positions_of(run, "max_length") or 0, "max_length")
    if not length:
        run.put("data.long_prompt", "error", "max_length")
        run.put("data.long_completion", "error", "max_length")
    elif run["truncation_mode"] == "keep_end":
        run.put("data.long_prompt", "cut", "truncation_mode")
        run.put("data.long_completion", "error", "truncation_mode")
        run.differ("long prompts lose their beginning, the same for both completions; TRL cuts each side by itself.")
    elif older:
        run.put("data.max_completion_length", length - older, "max_prompt_length", "max_length")
        run.put("data.long_prompt", "cut", "max_prompt_length")
        run.differ("a completion has max_length - max_prompt_length tokens, behind a short prompt, too.")
    else:
        run.put("data.long_prompt", "drop", "max_length", "truncation_mode")
        run.put("data.long_completion", "cut", "max_length", "truncation_mode")


def positions_of(run: Translation, name: str) -> int | None:
    """Return the number of positions of the model, which limits what has no other limit; else refuse.

    Args:
        run: The translation.
        name: The setting that should give a limit.
    """
    remote = bool(run["trust_remote_code"])
    found = positions(run["model_name_or_path"] or "", revision=run["model_revision"], trust_remote_code=remote)
    if found is None:
        run.refuse(name, "a number is needed, as that of the model's positions cannot be read here")
    return found


def alpha_divergence(coefficient: float) -> str:
    """Return falign's name of TRL's α-divergence, whose coefficient is 1 - α.

    Example:
        >>> alpha_divergence(0.3), alpha_divergence(1.0)
        ('alpha(0.7)', 'reverse_kl')
    """
    alpha = round(1 - coefficient, 12)
    return "reverse_kl" if alpha == 0 else f"alpha({alpha:g})"


def _divergence(run: Translation) -> str:
    kind = str(run["f_divergence_type"])
    kind = kind.removeprefix("FDivergenceType.").lower()
    if kind == "alpha_divergence":
        return alpha_divergence(run["f_alpha_divergence_coef"])
    if kind not in DIVERGENCES:
        run.refuse("f_divergence_type", f"TRL has {', '.join(DIVERGENCES)} and alpha_divergence")
    return DIVERGENCES.get(kind, "reverse_kl")


def _dpo(run: Translation) -> None:
    losses = as_list(run["loss_type"])
    weights = [float(each) for each in as_list(run["loss_weights"])] or [1.0] * len(losses)
    if len(weights) != len(losses):
        raise ConfigError(f"loss_weights has {len(weights)} numbers, and loss_type {len(losses)} losses.")
    divergence = _divergence(run)
    terms = []
    for loss, weight in zip(losses, weights, strict=True):
        if loss in WITHOUT_COUNTERPART:
            run.refuse("loss_type", f"{loss}: {WITHOUT_COUNTERPART[loss]}")
        elif loss == "sft":
            terms.append(("sft", {"kind": "supervised", "completions": "chosen"}, weight))
        elif loss == "apo_zero":  # a sum over the two completions; ours is their mean
            section = {"kind": "unpaired", "beta": run["beta"], "reference_point": "zero"}
            terms.append((loss, section, 2 * weight))
        else:
            terms.append((loss, _pairwise(run, loss, divergence), weight))
    if run["rpo_alpha"]:
        terms.append(("sft", {"kind": "supervised", "completions": "chosen"}, run["rpo_alpha"]))
    names = ("loss_type", "beta", "f_divergence_type", "label_smoothing", "loss_weights", "rpo_alpha")
    run.put("objective", weighted_terms(terms) if terms else {}, *names)


def _pairwise(run: Translation, loss: str, divergence: str) -> dict[str, Any]:
    section: dict[str, Any] = {"kind": "pairwise", "divergence": divergence, "beta": run["beta"]}
    if loss == "sigmoid":
        if run.is_given("label_smoothing") and run["label_smoothing"]:
            run.differ(
                "TRL's sigmoid loss ignores label_smoothing, which is left out; objective.margin_loss: "
                f"conservative({run['label_smoothing']:g}) smooths, as older releases did."
            )
        return {**section, "margin_loss": "logistic"}
    if loss == "hinge":
        return {**section, "margin_loss": "hinge"}
    if loss in ("robust", "exo_pair"):
        if loss == "exo_pair" and not run["label_smoothing"]:
            run.refuse("label_smoothing", "exo_pair needs a value above 0, there and here")
        name = "robust" if loss == "robust" else "exo"
        return {**section, "margin_loss": f"{name}({run['label_smoothing']:g})"}
    if loss in ("ipo", "sigmoid_norm"):
        if divergence != "reverse_kl":
            run.refuse(
                "f_divergence_type",
                f"with {loss} TRL divides f'(u) of whole completions by their length; length_norm: token takes f' of "
                "the mean log-ratio, which is the same for reverse_kl only",
            )
        return {**section, "margin_loss": "ipo" if loss == "ipo" else "logistic", "length_norm": "token"}
    run.refuse("loss_type", f"{loss} is not a loss of trl dpo")
    return section


def _kto(run: Translation) -> None:
    kinds = {"kto": "mismatched", "apo_zero_unpaired": "zero"}
    kind = run["loss_type"]
    if kind not in kinds:
        run.refuse("loss_type", f"trl kto has {' and '.join(kinds)}")
        return
    if kind == "kto":
        run.differ("KTO's reference point is a mean over all rows of an optimizer step; TRL's is over a micro-batch.")
    section = {"kind": "unpaired", "beta": run["beta"], "reference_point": kinds[kind]}
    weights = {name: run[name] for name in ("desirable_weight", "undesirable_weight")}
    run.put("objective", {**section, **weights}, "loss_type", "beta", *weights)


def _sft(run: Translation) -> None:
    if run["loss_type"] != "nll":
        run.refuse("loss_type", "fine-tuning has the loss nll; objective.kind=supervised has f-divergences besides")
    if run["dataset_text_field"] != "text":
        run.refuse(
            "dataset_text_field",
            "the loss counts completions, so rows need a prompt: columns prompt and completion, or messages",
        )
    _template(run)
    if not run.is_given("completion_only_loss") and not run["assistant_only_loss"]:
        run.differ(
            "the loss counts the last turn of messages, and completions behind a prompt; TRL also trains on all other "
            "tokens of messages unless assistant_only_loss is set."
        )
    run.put("objective", {"kind": "supervised"}, "loss_type")


def _template(run: Translation) -> None:
    template = run["chat_template_path"]
    if template is not None:
        if Path(template).suffix not in (".jinja", ".jinja2", ".j2"):
            run.refuse("chat_template_path", "model.chat_template is a Jinja file or text; save the template as one")
        run.put("model.chat_template", template, "chat_template_path")


def _reward(run: Translation) -> None:
    _template(run)
    run.put("data.long_completion", "drop", "max_length")  # TRL leaves out longer pairs
    run.put(
        "objective",
        {"kind": "reward_model", "centering": run["center_rewards_coefficient"] or 0.0},
        "center_rewards_coefficient",
    )
    run.origins["objective"] = "trl reward"


def reference(run: Translation) -> None:
    """Translate the reference."""
    if run["ref_model"] is not None:
        run.put("reference", {"kind": "frozen", "path": run["ref_model"]}, "ref_model")
    if run["sync_ref_model"]:
        section = {
            "kind": "moving_average",
            "alpha": run["ref_model_mixup_alpha"],
            "every": run["ref_model_sync_steps"],
        }
        run.put("reference", section, "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")


OBJECTIVES = {"dpo": _dpo, "kto": _kto, "sft": _sft, "reward": _reward}
