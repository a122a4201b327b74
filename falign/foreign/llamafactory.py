"""Configurations of LLaMA-Factory, with the descriptions of their data in ``dataset_info.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from falign.choices import similar
from falign.errors import ConfigError
from falign.foreign.llamafactory_rows import DEFAULTS, LLAMAFACTORY
from falign.foreign.reasons import INT8
from falign.foreign.rows import Value
from falign.foreign.shared import as_list, best_model, launch_of, new_tokens, schedule_steps, weighted_terms
from falign.foreign.translation import Translation

__all__ = ["translated"]

STAGES = {
    "pt": "fine-tuning counts completions behind a prompt; plain texts have none",
    "ppo": "its settings differ; configs/ppo-arithmetic.yaml is PPO with a value head",
}
REFERENCE_FREE = {
    "orpo": "ORPO is defined without a reference, which preference objectives of falign have",
    "simpo": "SimPO is defined without a reference, which preference objectives of falign have",
    "kto_pair": "its reference point is that of a batch of pairs; use stage: kto, or objective.kind=unpaired on pairs",
}
MARGINS = {"sigmoid": "logistic", "hinge": "hinge", "ipo": "ipo"}
ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
CHATML_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
    "function_tag": "function_call",
}
SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}


def translated(given: dict[str, Value], *, command: str | None, folder: Path, processes: int | None) -> Translation:
    """Return the translation of a configuration of LLaMA-Factory.

    Args:
        given: The settings, as in the file of ``llamafactory-cli train``.
        command: Must be None: the setting ``stage`` is the method.
        folder: The folder of the file, from which ``dataset_dir`` is looked for, too.
        processes: Number of processes of their run.

    Raises:
        ConfigError: Settings are unknown, invalid or have no counterpart, or a description of data is missing.
    """
    if command is not None:
        raise ConfigError(f"--method {command}: in LLaMA-Factory the setting stage is the method; leave it out.")
    run = Translation("LLaMA-Factory", "llamafactory", given, DEFAULTS, LLAMAFACTORY)
    run.require_known()
    run.apply_rows()
    stage = run["stage"]
    if stage not in ("sft", "dpo", "kto", "rm"):
        run.refuse("stage", STAGES.get(stage, "the stages that are imported are sft, dpo, kto and rm"))
    _model(run)
    launch_of(run, fsdp=run["fsdp"], deepspeed=run["deepspeed"], processes=processes, folder=folder)
    _ = run["fsdp_config"]
    schedule_steps(run)
    best_model(run, patience=run["early_stopping_steps"], name="early_stopping_steps")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        run.put(f"training.{name}", run[name], name)
    run.put(
        "training.gradient_checkpointing", not run["disable_gradient_checkpointing"], "disable_gradient_checkpointing"
    )
    _data(run, folder)
    _objective(run, stage)
    run.finish()
    return run


def _model(run: Translation) -> None:
    if run["model_name_or_path"] is None:
        run.refuse("model_name_or_path", "it is required")
    if run["model_revision"] not in (None, "main"):
        run.put("model.revision", run["model_revision"], "model_revision")
    if run["flash_attn"] != "auto":
        if run["flash_attn"] not in ATTENTION:
            run.refuse("flash_attn", f"choose one of {', '.join(ATTENTION)}")
        run.put("model.attn_implementation", ATTENTION.get(run["flash_attn"], "sdpa"), "flash_attn")
    kind = run["finetuning_type"]
    if kind not in ("lora", "full"):
        run.refuse("finetuning_type", "all weights are trained (full), or LoRA adapters (lora)")
    if run["fp16"]:
        run.refuse("fp16", "float16 needs a scaled loss; use bf16, or leave it out")
    if run["bf16"] or run["pure_bf16"]:
        run.put("model.dtype", "bfloat16", "bf16", "pure_bf16")
        if kind == "full" and not run["pure_bf16"]:
            run.put("model.dtype", "float32", "bf16")
            run.differ(
                "LLaMA-Factory computes in bfloat16 by autocast over float32 weights; here float32 weights "
                "compute in float32. model.dtype: bfloat16 is faster."
            )
    _quantization(run)
    new_tokens(run, "add_tokens", "add_special_tokens")
    if kind == "full":
        run.put("adapter", None, "finetuning_type")
    elif run["adapter_name_or_path"] is not None:
        if len(names := as_list(run["adapter_name_or_path"])) > 1:
            run.refuse("adapter_name_or_path", "one adapter can go on; merge the others into the model first")
        run.put("adapter.init", names[0], "adapter_name_or_path")
        run.put("adapter.dropout", run["lora_dropout"], "lora_dropout")
    else:
        _lora(run)


def _lora(run: Translation) -> None:
    rank, targets = run["lora_rank"], as_list(run["lora_target"])
    alpha = run["lora_alpha"] or 2 * rank
    run.put("adapter.r", rank, "lora_rank", "finetuning_type")
    run.put("adapter.alpha", alpha, "lora_alpha", "lora_rank")
    run.put("adapter.dropout", run["lora_dropout"], "lora_dropout")
    run.put("adapter.target_modules", "all-linear" if targets == ["all"] else targets, "lora_target")
    for name in ("use_rslora", "use_dora"):
        if run[name]:
            run.put(f"adapter.{name}", True, name)
    if modules := as_list(run["additional_target"]):
        run.put("adapter.modules_to_save", modules, "additional_target")
    if run["pissa_init"]:
        starts = {-1: "pissa", 4: "pissa_niter_4", 16: "pissa_niter_16"}
        if run["pissa_iter"] not in starts:
            run.refuse("pissa_iter", f"adapter.init_lora_weights has {', '.join(map(str, starts))}")
        run.put("adapter.init_lora_weights", starts.get(run["pissa_iter"], "pissa"), "pissa_init", "pissa_iter")


def _quantization(run: Translation) -> None:
    bits = run["quantization_bit"]
    if bits is None:
        return
    if bits == 8 and run["quantization_method"] in ("bnb", "bitsandbytes"):
        run.put("model.quantization", "int8", "quantization_bit", "quantization_method")
        run.differ(INT8)
        return
    if bits != 4 or run["quantization_method"] not in ("bnb", "bitsandbytes") or run["quantization_type"] != "nf4":
        run.refuse("quantization_bit", "model.quantization supports nf4 in 4 bits and int8 of bitsandbytes")
        return
    run.put("model.quantization", "nf4", "quantization_bit")
    if not run["double_quantization"]:
        run.differ("4-bit weights always have double quantization here (double_quantization: true).")


def _objective(run: Translation, stage: str) -> None:
    if stage == "sft":
        run.put("objective", {"kind": "supervised"}, "stage")
        if not run["mask_history"]:
            run.differ(
                "the loss counts the last answer of a conversation; LLaMA-Factory also trains on the earlier "
                "ones unless mask_history is set."
            )
        return
    if stage == "rm":
        run.put("objective", {"kind": "reward_model"}, "stage")
        return
    beta, names = run["pref_beta"], ("stage", "pref_loss", "pref_beta", "dpo_label_smoothing", "pref_ftx")
    terms: list[tuple[str, dict[str, Any], float]] = []
    if stage == "kto":
        weights = {"desirable_weight": run["kto_chosen_weight"], "undesirable_weight": run["kto_rejected_weight"]}
        terms.append(("kto", {"kind": "unpaired", "beta": beta, **weights}, 1.0))
        names += ("kto_chosen_weight", "kto_rejected_weight")
        run.differ("KTO's reference point is a mean over all rows of an optimizer step, there over a micro-batch.")
        if run["pref_ftx"]:
            run.refuse("pref_ftx", "a supervised term would also learn from rows that are labeled undesirable")
    elif stage == "dpo":
        loss = run["pref_loss"]
        if loss not in MARGINS:
            run.refuse("pref_loss", REFERENCE_FREE.get(loss, f"choose one of {', '.join(MARGINS)}"))
            return
        smoothing = run["dpo_label_smoothing"]
        margin = f"conservative({smoothing:g})" if smoothing and loss == "sigmoid" else MARGINS[loss]
        section = {"kind": "pairwise", "beta": beta, "margin_loss": margin}
        terms.append(("dpo", {**section, "length_norm": "token"} if loss == "ipo" else section, 1.0))
        if run["pref_ftx"]:
            terms.append(("sft", {"kind": "supervised", "completions": "chosen"}, run["pref_ftx"]))
            run.differ(
                "the supervised term is a mean over the tokens of all chosen completions; LLaMA-Factory takes "
                "the mean of each completion first (pref_ftx)."
            )
    if terms:
        run.put("objective", weighted_terms(terms), *names)
        _reference(run)


def _reference(run: Translation) -> None:
    if run["ref_model"] is not None:
        section = {"kind": "frozen", "path": run["ref_model"]}
        if bits := run["ref_model_quantization_bit"]:
            if bits not in (4, 8):
                run.refuse("ref_model_quantization_bit", "reference.quantization supports nf4 in 4 bits, and int8")
            section["quantization"] = "int8" if bits == 8 else "nf4"
        run.put("reference", section, "ref_model", "ref_model_quantization_bit")
    elif run["adapter_name_or_path"] is not None and run["finetuning_type"] == "lora":
        run.put("reference", {"kind": "adapter_off"}, "adapter_name_or_path")
        run.differ(
            "the reference is the model without any adapter, as there; without the section it would be the "
            "adapter that training starts from."
        )


def _data(run: Translation, folder: Path) -> None:
    names, held = as_list(run["dataset"]), as_list(run["eval_dataset"])
    if not names:
        run.refuse("dataset", "it is required")
        return
    if run["template"] is not None:
        run.differ(
            f"turns are rendered by the tokenizer's chat template, which should be LLaMA-Factory's template "
            f"{run['template']}; set model.chat_template if it is another."
        )
    info, where = _dataset_info(run, folder)
    run.put("data.train", [_source(run, name, info, where) for name in names], "dataset")
    if held:
        run.put("data.eval", [_source(run, name, info, where) for name in held], "eval_dataset")
    if size := run["val_size"]:
        field, value = ("eval_size", int(size)) if size >= 1 else ("eval_fraction", float(size))
        run.put(f"data.{field}", value, "val_size")
    run.put("data.long_prompt", "drop", "cutoff_len")
    run.differ(
        "a row whose prompt leaves no room is dropped and counted, and long answers are cut; there prompt and "
        "answer share the cut (cutoff_len)."
    )


def _dataset_info(run: Translation, folder: Path) -> tuple[Mapping[str, Any], Path]:
    """Return the descriptions of data by name, and their folder."""
    given = run["dataset_dir"]
    places = [*dict.fromkeys([folder / given, Path(given), folder])]
    for place in places:
        if (file := place / "dataset_info.json").is_file():
            return json.loads(file.read_text(encoding="utf-8")), place
    raise ConfigError(
        f"llamafactory: no dataset_info.json in {' or '.join(map(str, places))}, which describes the data; copy it "
        "there, or set dataset_dir."
    )


def _source(run: Translation, name: str, info: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return the source of one described dataset."""
    if name not in info:
        close = similar(name, info)
        raise ConfigError(
            f"dataset {name!r} is not in {where / 'dataset_info.json'}{f': did you mean {close}?' if close else '.'}"
        )
    entry = dict(info[name])
    sharegpt = entry.pop("formatting", "alpaca") == "sharegpt"
    ranking, columns, tags = entry.pop("ranking", False), dict(entry.pop("columns", {})), entry.pop("tags", None)
    hub, file = entry.pop("hf_hub_url", None), entry.pop("file_name", None)
    source: dict[str, Any] = {"path": hub if hub is not None else str(where / str(file))}
    if split := entry.pop("split", None):
        source["split"] = split
    for ignored in ("ms_hub_url", "om_hub_url"):
        entry.pop(ignored, None)
    rest = [key for key, value in entry.items() if value]
    rest += [key for key in ("images", "videos", "audios", "tools") if columns.pop(key, None)]
    if rest or (hub is None and file is None):
        run.refuse(
            "dataset", f"{name} has {', '.join(rest) or 'neither hf_hub_url nor file_name'} in dataset_info.json"
        )
    if any(value not in (SHAREGPT_TAGS.get(key), CHATML_TAGS.get(key)) for key, value in (tags or {}).items()):
        run.refuse("dataset", f"{name} has tags {tags}; turns are read with role and content, or from and value")
    mapping = (_sharegpt if sharegpt else _alpaca)(columns, ranking=ranking, labeled="kto_tag" in columns)
    source["format"] = mapping.pop("format")
    renamed = {ours: theirs for ours, theirs in mapping.items() if ours != theirs}
    if renamed:
        source["columns"] = renamed
    if not sharegpt:
        source["chat"] = True
    if limit := run["max_samples"]:
        source["limit"] = limit
    return source


def _alpaca(columns: dict[str, str], *, ranking: bool, labeled: bool) -> dict[str, str]:
    prompt, answer = columns.get("prompt", "instruction"), columns.get("response", "output")
    system = {"system": columns["system"]} if "system" in columns else {}
    if labeled:
        return {"format": "unpaired", "prompt": prompt, "completion": answer, "label": columns["kto_tag"], **system}
    found = {"format": "alpaca", "instruction": prompt, "input": columns.get("query", "input"), **system}
    if "history" in columns:
        found["history"] = columns["history"]
    if ranking:
        return {**found, "chosen": columns.get("chosen", "chosen"), "rejected": columns.get("rejected", "rejected")}
    return {**found, "completion": answer}


def _sharegpt(columns: dict[str, str], *, ranking: bool, labeled: bool) -> dict[str, str]:
    messages = columns.get("messages", "conversations")
    system = {"system": columns["system"]} if "system" in columns else {}
    if ranking:
        pair = {"chosen": columns.get("chosen", "chosen"), "rejected": columns.get("rejected", "rejected")}
        return {"format": "sharegpt", "conversations": messages, **pair, **system}
    if labeled:
        return {"format": "unpaired", "messages": messages, "label": columns["kto_tag"], **system}
    return {"format": "completion", "messages": messages, **system}
