"""Settings that TRL, LLaMA-Factory and axolotl have in common, translated once."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from falign.choices import shown
from falign.errors import ConfigError
from falign.foreign.rows import Value
from falign.foreign.translation import Launch, Translation

__all__ = [
    "as_list",
    "best_model",
    "default_targets",
    "launch_of",
    "new_tokens",
    "positions",
    "schedule_steps",
    "weighted_terms",
    "zero_stage",
]


def as_list(value: Value) -> list[Any]:
    """Return a list; a text of names separated by commas or spaces is one, too."""
    if value is None:
        return []
    return re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else list(value)


def default_targets(model: str, *, revision: str | None, trust_remote_code: bool) -> list[str] | str:
    """Return the modules that PEFT adapts in a model if none are named.

    Raises:
        ConfigError: The model's configuration cannot be read, or PEFT has no default for its architecture.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"target modules are not given, and PEFT's default follows from the architecture of {model}, which cannot "
            "be read here: name them, such as all-linear"
        ) from error
    if config.model_type not in DEFAULTS:
        raise ConfigError(f"target modules are not given, and PEFT has no default for {config.model_type}: name them")
    return sorted(DEFAULTS[config.model_type])


def new_tokens(run: Translation, *names: str) -> None:
    """Translate tokens that are added to the tokenizer, in lists or separated by commas."""
    found = [token for name in names for token in as_list(run[name])]
    if found:
        run.put("model.new_tokens", found, *names)
        run.differ(f"embeddings of new tokens begin as the mean of the others ({', '.join(names)}).")


def positions(model: str, *, revision: str | None, trust_remote_code: bool) -> int | None:
    """Return the number of positions of a model; None if its configuration cannot be read here, or has none."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):  # the caller asks for the number
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def zero_stage(deepspeed: Value, folder: Path) -> int:
    """Return the stage of ZeRO of a configuration: a mapping, a file, or a name such as ``zero3.json``."""
    if isinstance(deepspeed, str):
        files = [file for file in (folder / deepspeed, Path(deepspeed)) if file.is_file()]
        if not files:
            found = re.search(r"(?:zero|z|stage)[-_]?([0-3])", Path(deepspeed).stem, re.IGNORECASE)
            return int(found[1]) if found else 3
        deepspeed = json.loads(files[0].read_text(encoding="utf-8"))
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0) if isinstance(deepspeed, Mapping) else 3
    return int(stage)


def launch_of(run: Translation, *, fsdp: Value, deepspeed: Value, processes: int | None, folder: Path) -> None:
    """Record how processes share the run.

    Args:
        run: The translation.
        fsdp: The setting for FSDP: a text, a list, or true.
        deepspeed: The setting for DeepSpeed.
        processes: Number of processes, if it is known.
        folder: The folder of the configuration, to find a file of DeepSpeed.
    """
    words = [] if fsdp in (None, False, "") else ["full_shard"] if fsdp is True else as_list(fsdp)
    if "offload" in words:
        run.refuse("fsdp", "weights and gradients are not moved to the CPU; use more GPUs, or an adapter")
    kind = None
    if words:
        kind = "ddp" if "no_shard" in words else "fsdp2"
    elif deepspeed not in (None, False, ""):
        stage = zero_stage(deepspeed, folder)
        kind = "fsdp2" if stage >= 2 else "ddp"
        run.differ(
            f"DeepSpeed's ZeRO-{stage} becomes --launch {kind}"
            + (", which shards weights, gradients and optimizer state." if kind == "fsdp2" else "; nothing is sharded.")
        )
    elif processes is not None and processes > 1:
        kind = "ddp"
    run.launch = Launch(kind, processes)


def schedule_steps(run: Translation) -> None:
    """Translate the intervals of transformers' trainer: logging, evaluation, checkpoints, warm-up."""
    logging = run["logging_steps"]
    if run.is_given("warmup_ratio") and run["warmup_ratio"] and not run["warmup_steps"]:
        run.put("training.warmup_steps", run["warmup_ratio"], "warmup_ratio")
    else:
        run.put("training.warmup_steps", run["warmup_steps"], "warmup_steps")
    if _is_steps(logging):
        run.put("training.logging_steps", int(logging), "logging_steps")
    else:
        run.unused["logging_steps"] = "a share of all steps; training.logging_steps counts steps, 10 by default"
    if run["save_strategy"] == "steps" and _is_steps(run["save_steps"]):
        run.put("training.save_steps", int(run["save_steps"]), "save_steps", "save_strategy")
    elif run["save_strategy"] != "no":
        run.unused["save_strategy"] = "training.save_steps counts steps; no checkpoints are written until it is set"
    if run["eval_strategy"] == "steps":
        every = run["eval_steps"] or logging
        if _is_steps(every):
            run.put("training.eval_steps", int(every), "eval_steps", "eval_strategy")
        else:
            run.unused["eval_steps"] = "a share of all steps; training.eval_steps counts steps"
    elif run["eval_strategy"] == "epoch":
        run.unused["eval_strategy"] = (
            "held-out data are evaluated before the first step and after the last; training.eval_steps adds more"
        )
    trackers = [name for name in as_list(run["report_to"]) if name != "none"]
    if trackers:
        run.put("training.report_to", trackers, "report_to")


def best_model(run: Translation, *, patience: int | None = None, name: str = "early_stopping_patience") -> None:
    """Translate the choice of the best model, and the end of a run whose metric no longer gets better.

    Args:
        run: The translation, with the settings of transformers' trainer.
        patience: Evaluations without an improvement after which the run ends.
        name: The setting that has it.
    """
    if not run["load_best_model_at_end"] and not patience:
        return
    metric = (run["metric_for_best_model"] or "loss").removeprefix("eval_")
    section: dict[str, Any] = {"metric": metric}
    if run["greater_is_better"] is not None:
        section["greater_is_better"] = run["greater_is_better"]
    names = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
    if run["load_best_model_at_end"]:
        run.put("training.keep_best", section, *names)
    if patience:
        run.put("training.early_stopping", {**section, "patience": patience}, name, *names[1:])


def _is_steps(value: Value) -> bool:
    return isinstance(value, int | float) and value >= 1 and math.isfinite(value)


def weighted_terms(terms: Sequence[tuple[str, dict[str, Any], float]]) -> dict[str, Any]:
    """Return the section of a weighted sum of objectives; that of the objective alone if there is one with weight 1.

    Args:
        terms: Name, section and weight of each.
    """
    if len(terms) == 1 and terms[0][2] == 1:
        return terms[0][1]
    weights = {name: weight for name, _, weight in terms if weight != 1}
    section: dict[str, Any] = {"kind": "sum", "terms": {name: term for name, term, _ in terms}}
    return {**section, "weights": weights} if weights else section


def mapping_of(value: Value, name: str) -> Mapping[str, Any]:
    """Return a mapping that may be written as JSON.

    Raises:
        ConfigError: It is neither.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: {shown(value)} is not JSON ({error.msg}).") from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"{name}: {shown(value)} must be a mapping.")
    return found
