"""Configurations of TRL's commands on samples: ``trl grpo`` and ``trl rloo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from falign.errors import ConfigError
from falign.foreign.shared import as_list, best_model, positions, schedule_steps, weighted_terms
from falign.foreign.translation import Translation
from falign.foreign.trl import adapter_and_model, processes_and_launch, reference, sources

__all__ = ["translate"]

LONGEST_PROMPT = 4096
"""The limit of a prompt's tokens, where TRL has none; a longer prompt is an error."""

WITHOUT_COUNTERPART = {
    "cispo": "CISPO multiplies the score by a clipped weight, and so keeps the gradient where clipping removes it",
    "sapo": "SAPO's soft gate has no counterpart in objective.clip_low and objective.clip_high",
    "vespo": "VESPO reshapes the weight of a whole completion",
    "luspo": "LUSPO sums a weight of the whole completion over its tokens",
}
BUILT_IN = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")


def translate(run: Translation, command: str, folder: Path) -> None:
    """Translate the settings that depend on each other.

    Args:
        run: The translation, whose rows have been applied.
        command: ``grpo`` or ``rloo``.
        folder: The folder of the configuration.
    """
    processes_and_launch(run, folder)
    adapter_and_model(run)
    schedule_steps(run)
    best_model(run)
    data, eval_data, held_out = sources(run)
    run.put("prompts.train", data, "dataset_name", "datasets")
    if eval_data:
        run.put("prompts.eval", eval_data, "dataset_test_split", "eval_strategy")
    if 0 < held_out < 1:
        run.refuse("test_split_size", "prompts.eval_size is a number of prompts")
    elif held_out:
        run.put("prompts.eval_size", int(held_out), "test_split_size")
    _prompt_limit(run)
    rollouts(run)
    rewards(run)
    _engine(run)
    (_grpo if command == "grpo" else _rloo)(run)
    if run["beta"]:
        reference(run)
    elif run["sync_ref_model"]:
        run.refuse("sync_ref_model", "beta is 0, so that nothing is held to a reference")


def _prompt_limit(run: Translation) -> None:
    model, remote = run["model_name_or_path"] or "", bool(run["trust_remote_code"])
    found = positions(model, revision=run["model_revision"], trust_remote_code=remote)
    limit = LONGEST_PROMPT if found is None else min(LONGEST_PROMPT, found - run["max_completion_length"])
    if limit < 1:
        run.refuse("max_completion_length", f"the model has {found} positions, for prompt and completion")
    run.put("prompts.max_length", limit)
    run.origins["prompts.max_length"] = "TRL has no limit; a longer prompt is an error"


def rollouts(run: Translation) -> None:
    """Translate the sizes of rollouts, batches and steps.

    TRL samples ``generation_batch_size`` completions, ``num_generations`` per prompt, and divides them into
    micro-batches of ``per_device_train_batch_size`` on each process; ``gradient_accumulation_steps`` of these make an
    optimizer step.
    """
    group, each = run["num_generations"], run["per_device_train_batch_size"]
    accumulated, processes = run["gradient_accumulation_steps"], run.launch.processes or 1
    if run.launch.kind and run.launch.processes is None:
        run.differ(
            "sizes are those of one process, as the number of processes is not in the file: import it again with "
            "--processes N, or multiply rollout.prompts by it."
        )
    total, steps = run["generation_batch_size"], run["steps_per_generation"]
    if total is not None and steps is not None:
        raise ConfigError("generation_batch_size and steps_per_generation exclude each other, in TRL, too.")
    if total is None:
        total = each * processes * (steps or accumulated)
    steps = total // (each * processes)
    minibatches = steps // accumulated
    prompts = total // group
    names = ("generation_batch_size", "steps_per_generation", "num_generations", "per_device_train_batch_size")
    if total % group or steps * each * processes != total:
        run.refuse("num_generations", f"{total} completions are not a whole number of prompts and micro-batches")
    elif minibatches * accumulated != steps:
        run.refuse(
            "gradient_accumulation_steps",
            f"an optimizer step would take micro-batches of two rollouts, as {steps} micro-batches per rollout are not "
            f"a multiple of {accumulated}",
        )
    elif minibatches > prompts:
        run.refuse(
            "steps_per_generation",
            f"{minibatches} optimizer steps divide {prompts} prompts, and falign keeps "
            "the completions of a prompt together",
        )
    else:
        run.put("rollout.prompts", prompts, *names, "gradient_accumulation_steps")
        run.put("rollout.completions", group, "num_generations")
        run.put("rollout.minibatches", minibatches, *names, "gradient_accumulation_steps")
        run.put("training.per_device_train_batch_size", max(1, each // group), "per_device_train_batch_size")
    run.put("rollout.updates", run["num_iterations"], "num_iterations")
    run.put("rollout.max_new_tokens", run["max_completion_length"], "max_completion_length")
    if run["temperature"] != 1:
        run.refuse(
            "temperature",
            "TRL trains the distribution at this temperature, falign the one at 1, with samples weighted by "
            "π/π_sampler; set it to 1, or rollout.temperature in the run file",
        )
    if run["num_generations_eval"] is not None:
        run.put("rollout.evaluation.completions", run["num_generations_eval"], "num_generations_eval")


def rewards(run: Translation) -> None:
    """Translate reward models and functions, in TRL's order."""
    found: list[dict[str, Any]] = []
    if run["reward_model_name_or_path"] is not None:
        found.append({"kind": "classifier", "path": run["reward_model_name_or_path"], "text": "chat"})
        run.differ("the reward model reads prompt and completion as a conversation (rewards.0.text: chat).")
    for name in as_list(run["reward_funcs"]):
        if name == "get_soft_overlong_punishment":
            run.refuse(
                "reward_funcs",
                f"{name} makes a function; write a module with `reward = get_soft_overlong_punishment(1280, 256)` and "
                "name module.reward",
            )
            continue
        path = f"trl.rewards.{name}" if name in BUILT_IN else name
        if "." not in path:
            run.refuse("reward_funcs", f"{name} is neither a function of TRL nor module.function")
            continue
        module, _, function = path.replace(":", ".").rpartition(".")
        found.append({"kind": "function", "function": f"{module}:{function}", "form": "trl"})
    weights = run["reward_weights"]
    if weights is not None:
        if len(weights) != len(found):
            run.refuse("reward_weights", f"there are {len(weights)} weights and {len(found)} rewards")
        found = [{**each, "weight": float(weight)} for each, weight in zip(found, weights, strict=False)]
    if not found:
        run.refuse("reward_funcs", "a run needs a reward: module.function, or reward_model_name_or_path")
    run.put("rewards", found, "reward_funcs", "reward_model_name_or_path", "reward_weights")


def _engine(run: Translation) -> None:
    if not run["use_vllm"]:
        return
    if run["vllm_mode"] != "server":
        run.differ("vLLM inside the training process becomes sampling with transformers; docs/vllm.md has the server.")
        return
    host = "127.0.0.1" if run["vllm_server_host"] == "0.0.0.0" else run["vllm_server_host"]
    url = run["vllm_server_base_url"] or f"http://{host}:{run['vllm_server_port']}"
    folder = f"{run['output_dir']}-served"
    run.put(
        "rollout.engine",
        {"kind": "vllm", "url": url, "shared_dir": folder, "wait": run["vllm_server_timeout"]},
        "use_vllm",
        "vllm_mode",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
    )
    run.differ(f"the vLLM server is that of scripts/vllm_server.sh, which must see {folder}; not `trl vllm-serve`.")
    if run["vllm_importance_sampling_correction"]:
        mode = run["vllm_importance_sampling_mode"]
        cap = run["vllm_importance_sampling_cap"] or run["vllm_importance_sampling_clip_max"]
        if mode == "token_truncate" and cap:
            run.put(
                "rollout.correction",
                {"cap": cap},
                "vllm_importance_sampling_mode",
                "vllm_importance_sampling_clip_max",
                "vllm_importance_sampling_cap",
            )
        else:
            run.differ(
                f"samples that vLLM finds likelier are not left out ({mode}); rollout.correction bounds weights."
            )


def _clips(run: Translation) -> dict[str, float]:
    high = run["epsilon_high"]
    return {"clip_low": run["epsilon"], "clip_high": run["epsilon"] if high is None else high}


def _grpo(run: Translation) -> None:
    if run["importance_sampling_level"] != "token":
        run.refuse(
            "importance_sampling_level",
            "GSPO's weight of a completion is the geometric mean of its tokens' weights; "
            "objective.importance: sequence is their product, which is exact",
        )
    scaled = {True: "group_normalised", "group": "group_normalised", False: "group_centred", "none": "group_centred"}
    advantage = scaled.get(run["scale_rewards"])
    if advantage is None:
        run.refuse("scale_rewards", "no advantage divides by the deviation of a whole batch; group and none work")
    loss, weight = run["loss_type"], 1.0
    reductions = {"grpo": "sequence_mean", "dapo": "token_mean", "bnpo": "token_mean", "dr_grpo": "sequence_sum"}
    if loss not in reductions:
        run.refuse("loss_type", WITHOUT_COUNTERPART.get(loss, f"{loss} is not a loss of trl grpo"))
        return
    if loss == "dr_grpo":  # the sum over tokens divided by a constant
        weight = 1 / run["max_completion_length"]
    if loss == "bnpo":
        run.differ("bnpo's mean is over the tokens of a micro-batch in TRL, and over those of the step here.")
    section: dict[str, Any] = {"kind": "policy_gradient", "advantage": advantage, "importance": "token", **_clips(run)}
    if run["beta"]:
        exact = run["use_bias_correction_kl"]
        section |= {"divergence": "reverse_kl" if exact else "forward_kl", "beta": run["beta"], "level": "token"}
        if not exact:
            run.differ("TRL's penalty without bias correction has the gradient of the forward KL, which is named here.")
    section["reduction"] = reductions[loss]
    names = ("loss_type", "beta", "epsilon", "epsilon_high", "scale_rewards", "use_bias_correction_kl")
    run.put("objective", weighted_terms([("grpo", section, weight)]), *names)


def _rloo(run: Translation) -> None:
    section: dict[str, Any] = {"kind": "policy_gradient", "advantage": "leave_one_out", "importance": "sequence"}
    if run["beta"]:
        section |= {"divergence": "reverse_kl", "beta": run["beta"], "level": "sequence"}
        run.differ(
            "the penalty has the exact gradient of the KL of whole completions; TRL subtracts it from the reward."
        )
    section |= {**_clips(run), "reduction": "sequence_sum"}
    run.put("objective", section, "beta", "epsilon", "epsilon_high")
