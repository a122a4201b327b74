"""Settings of TRL's commands: their rows, the names that each command has, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping

from falign.foreign.peft_rows import LORA_CONFIG
from falign.foreign.reasons import CLIPPING, DPO_LOSS, ENTROPY, LOADER, SAMPLING, SERVER, SHARDING
from falign.foreign.rows import Row, copied, each, read, refused, unused
from falign.foreign.transformers_rows import TRAINING, TRAINING_DEFAULTS

__all__ = ["COMMANDS", "TRL"]

_SCRIPT: Mapping[str, Row] = {
    "model_name_or_path": copied("model.path"),
    "base_model_name_or_path": copied("model.path"),
    "model_revision": read("model.revision"),
    "model_init_kwargs": read("model.dtype", "model.attn_implementation", "model.revision"),
    "trust_remote_code": copied("model.trust_remote_code"),
    "dtype": read("model.dtype"),
    "torch_dtype": read("model.dtype"),
    "attn_implementation": read("model.attn_implementation"),
    "load_in_4bit": read("model.quantization", note="nf4"),
    "bnb_4bit_quant_type": read("model.quantization", note="nf4"),
    "load_in_8bit": read("model.quantization", note="int8"),
    "use_bnb_nested_quant": read(note="model.quantization=nf4 always has double quantization"),
    "bnb_4bit_quant_storage": unused("model.quantization=nf4 always stores and computes in bfloat16"),
    "dataset_name": read("data.train.0.path", "prompts.train.0.path", note="the second online; lists of sources"),
    "dataset_train_split": read("data.train.0.split", "prompts.train.0.split"),
    "dataset_test_split": read("data.eval.0.split", "prompts.eval.0.split"),
    "dataset_config": refused("data.train.0.path names a file, a folder or a repository with one configuration"),
    "dataset_streaming": refused(LOADER, False),
    "datasets": read("data.train", "prompts.train"),
    "streaming": refused(LOADER, False),
    "test_split_size": read("data.eval_fraction", "data.eval_size", "prompts.eval_size"),
    "ignore_bias_buffers": unused(SHARDING),
    **each("accelerate_config num_processes", read(note=SHARDING)),
    "env": unused("environment variables are set in the shell: NAME=value falign train RUN.yaml"),
}

_OBJECTIVES: Mapping[str, Row] = {
    "beta": read("objective.beta"),
    "max_length": read("data.max_length", "prompts.max_length"),
    "loss_type": read(
        "objective.margin_loss",
        "objective.reduction",
        note="logistic for sigmoid; online, sequence_mean for grpo and token_mean for dapo; for KTO's losses "
        "objective.kind=unpaired, with reference_point=zero for apo_zero_unpaired",
    ),
    "loss_weights": read("objective.weights", note="with objective.kind=sum, whose terms are the losses"),
    "f_divergence_type": read("objective.divergence"),
    "f_alpha_divergence_coef": read(
        "objective.divergence", note="as alpha(1 - coefficient): TRL's α is 1 minus the paper's"
    ),
    "label_smoothing": read(
        "objective.margin_loss", note="robust(0.1) or exo(0.001); conservative(0.1) where older releases smoothed"
    ),
    "truncation_mode": read("data.long_prompt", "data.long_completion"),
    "padding_free": unused("tree has no padding", "training.layout"),
    "precompute_ref_log_probs": unused("a folder", "reference.cache"),
    "precompute_ref_batch_size": unused("for reference.cache too", "training.per_device_eval_batch_size"),
    "sync_ref_model": read("reference.kind", note="moving_average or periodic_reset"),
    "ref_model_mixup_alpha": read("reference.alpha", note="with reference.kind=moving_average"),
    "ref_model_sync_steps": read("reference.every", note="with reference.kind=moving_average"),
    "ref_model": read("reference.path", note="with reference.kind=frozen"),
    "ref_adapter_name": read("reference.path", note="with reference.kind=adapter"),
    "max_prompt_length": read(
        "data.max_completion_length",
        "prompts.max_length",
        note="the first leaves the rest of data.max_length to the prompt; the second is that of online runs",
    ),
    "generate_during_eval": read("sampling.prompts"),
    "reference_free": refused("preference objectives are defined relative to a reference", False),
    "disable_dropout": refused("dropout of the model is always off; adapter.dropout is the adapter's", True),
    "rpo_alpha": read(
        "objective.terms", note="with objective.kind=sum, of a pairwise and a supervised term; falign.methods.RPO"
    ),
    "ld_alpha": refused("LD-DPO is not available; objective.length_norm=token is what corrects for length", 1.0),
    "use_weighting": refused(f"{DPO_LOSS}; WPO is not available", False),
    "discopop_tau": refused(f"{DPO_LOSS}; DiscoPOP is not available", 0.05),
    "router_aux_loss_coef": refused("falign does not add the auxiliary loss of a router", 0.0),
    **each(
        "pad_to_multiple_of pad_token padding_value label_pad_token_id max_target_length",
        unused("padding is masked by position and changes no result"),
    ),
    **each(
        "force_use_ref_model model_adapter_name",
        refused("reference.kind chooses the reference; its default is automatic", False),
    ),
    "desirable_weight": read("objective.desirable_weight", note="with objective.kind=unpaired"),
    "undesirable_weight": read("objective.undesirable_weight", note="with objective.kind=unpaired"),
    "chat_template_path": read("model.chat_template"),
    "dataset_text_field": read("data.train.0.columns"),
    "dataset_kwargs": refused(LOADER),
    "eos_token": refused("falign reads stop tokens from the tokenizer, template and generation settings"),
    "packing": refused("rows are not packed: training.tokens_per_batch fills batches", False),
    **each(
        "packing_strategy eval_packing",
        unused("rows are not packed: training.tokens_per_batch fills batches"),
    ),
    "completion_only_loss": refused("the loss always counts the tokens of completions only", True),
    "assistant_only_loss": unused("the loss always counts the tokens of completions only"),
    "center_rewards_coefficient": read("objective.centering", note="with objective.kind=reward_model"),
}

_ONLINE: Mapping[str, Row] = {
    "temperature": read("rollout.temperature"),
    "num_generations": read("rollout.completions"),
    "num_generations_eval": read("rollout.evaluation.completions"),
    "max_completion_length": read(
        "rollout.max_new_tokens", "data.max_completion_length", note="the second cuts given completions"
    ),
    "generation_batch_size": read("rollout.prompts", note="times rollout.completions"),
    "steps_per_generation": read("rollout.minibatches", note="optimizer steps per pass over a rollout"),
    "num_iterations": read("rollout.updates"),
    "epsilon": read("objective.clip_low", note="and objective.clip_high, with objective.kind=policy_gradient"),
    "epsilon_high": read("objective.clip_high"),
    "cliprange": read("objective.clip_low", note="and objective.clip_high, with objective.kind=policy_gradient"),
    "kl_coef": read("objective.beta", note="with objective.divergence"),
    "vf_coef": read("objective.value_coefficient"),
    "importance_sampling_level": read("objective.importance"),
    "reward_weights": read("rewards.0.weight", note="of each reward"),
    "reward_funcs": read("rewards.0.function", note="with rewards.0.kind=function"),
    "reward_model_name_or_path": read("rewards.0.path", note="with rewards.0.kind=classifier"),
    "scale_rewards": read("objective.advantage", note="group_normalised or group_centred"),
    "use_vllm": read("rollout.engine.kind", note="vllm"),
    "vllm_mode": read("rollout.engine.kind", note="vllm is a server"),
    **each("vllm_server_base_url vllm_server_host vllm_server_port", read("rollout.engine.url")),
    "vllm_server_timeout": read("rollout.engine.wait"),
    "vllm_importance_sampling_correction": read("rollout.correction"),
    "vllm_importance_sampling_cap": read("rollout.correction.cap"),
    "vllm_importance_sampling_clip_max": read("rollout.correction.cap"),
    "vllm_importance_sampling_mode": read("objective.importance", note="with rollout.correction"),
    "use_transformers_continuous_batching": unused("affects memory and speed only", "rollout.max_batch_tokens"),
    "transformers_continuous_batching_config": unused("affects memory and speed only", "rollout.max_batch_tokens"),
    "use_transformers_paged": unused("affects memory and speed only", "rollout.max_batch_tokens"),
    **each(
        "vllm_importance_sampling_clip_min off_policy_mask_threshold",
        refused("rollout.correction bounds weights above"),
    ),
    "top_p": refused(SAMPLING, 1.0),
    "top_k": refused(SAMPLING, 0, -1),
    "min_p": refused(SAMPLING, 0.0),
    "repetition_penalty": refused(SAMPLING, 1.0),
    "generation_kwargs": refused(SAMPLING, {}),
    "cache_implementation": unused("sampling uses the key-value cache of the model"),
    "chat_template_kwargs": copied("model.chat_template_kwargs"),
    "cast_lm_head_to_fp32": unused("logits are always converted to float32"),
    **each(
        "vllm_model_impl vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_max_model_length "
        "vllm_tensor_parallel_size vllm_group_port",
        unused(SERVER),
    ),
    "vllm_structured_outputs_regex": refused(SERVER),
    "delta": refused(CLIPPING),
    **each(
        "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
        read(note=CLIPPING),  # read by no loss that is imported
    ),
    "multi_objective_aggregation": refused(
        "the reward is the sum of all rewards, each times its weight", "sum_then_normalize"
    ),
    "mask_truncated_completions": refused("completions cut at the limit count, with the reward that they get", False),
    "top_entropy_quantile": refused(ENTROPY, 1.0),
    "entropy_coef": refused(ENTROPY, 0.0),
    "use_adaptive_entropy": refused(ENTROPY, False),
    **each("entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target", read(note=ENTROPY)),
    "max_tool_calling_iterations": refused("a completion is one turn, and falign calls no tools"),
    "use_bias_correction_kl": read(
        "objective.divergence", note="without it TRL's penalty has the gradient of forward_kl"
    ),
    "log_completions": copied("training.log_completions", convert=bool),
    "normalize_advantages": refused("no advantage of single completions is divided by a deviation of all", False),
    "reward_clip_range": refused("rewards are not clipped; rewards.0.transform, or your own function, may change them"),
    **each(
        "log_multimodal num_completions_to_print log_unique_prompts",
        unused("all completions are written to completions.jsonl; training.log_completions adds tables in trackers"),
    ),
}

TRL: Mapping[str, Row] = {**TRAINING, **_SCRIPT, **LORA_CONFIG, **_OBJECTIVES, **_ONLINE}
"""Settings by name, also those of earlier releases."""

_SCRIPT_DEFAULTS: Mapping[str, object] = {
    "model_name_or_path": None,
    "model_revision": "main",
    "model_init_kwargs": None,
    "trust_remote_code": False,
    "dtype": "float32",
    "torch_dtype": None,
    "attn_implementation": None,
    "use_peft": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "use_rslora": False,
    "use_dora": False,
    "lora_modules_to_save": None,
    "lora_target_parameters": None,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": False,
    "dataset_name": None,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "datasets": [],
    "test_split_size": None,
    "accelerate_config": None,
    "num_processes": None,
}

_SHARED: Mapping[str, object] = {
    **TRAINING_DEFAULTS,
    **_SCRIPT_DEFAULTS,
    "bf16": None,
    "gradient_checkpointing": True,
    "logging_steps": 10,
    "output_dir": "trainer_output",
}
_REFERENCE: Mapping[str, object] = {
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
}
_ROLLOUTS: Mapping[str, object] = {
    **_REFERENCE,
    "learning_rate": 1e-6,
    "temperature": 1.0,
    "num_generations_eval": None,
    "max_completion_length": 512,
    "generation_batch_size": None,
    "steps_per_generation": None,
    "num_iterations": 1,
    "epsilon": 0.2,
    "epsilon_high": None,
    "reward_weights": None,
    "reward_funcs": None,
    "reward_model_name_or_path": None,
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_server_base_url": None,
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_server_timeout": 240.0,
}

COMMANDS: Mapping[str, Mapping[str, object]] = {
    "dpo": {
        **_SHARED,
        **_REFERENCE,
        "learning_rate": 1e-6,
        "max_length": 1024,
        "truncation_mode": "keep_start",
        "loss_type": ["sigmoid"],
        "loss_weights": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
        "beta": 0.1,
        "rpo_alpha": None,
        "ref_model": None,
        "max_prompt_length": None,
    },
    "kto": {
        **_SHARED,
        **_REFERENCE,
        "learning_rate": 1e-6,
        "max_length": 1024,
        "loss_type": "kto",
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "ref_model": None,
        "max_prompt_length": None,
    },
    "sft": {
        **_SHARED,
        "learning_rate": 2e-5,
        "chat_template_path": None,
        "dataset_text_field": "text",
        "max_length": 1024,
        "truncation_mode": "keep_start",
        "loss_type": "nll",
    },
    "grpo": {
        **_SHARED,
        **_ROLLOUTS,
        "num_generations": 8,
        "beta": 0.0,
        "importance_sampling_level": "token",
        "scale_rewards": "group",
        "loss_type": "dapo",
        "use_bias_correction_kl": True,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "sequence_mask",
        "vllm_importance_sampling_clip_max": 3.0,
        "vllm_importance_sampling_cap": None,
    },
    "reward": {
        **_SHARED,
        "learning_rate": 1e-4,
        "max_length": 1024,
        "chat_template_path": None,
        "center_rewards_coefficient": None,
    },
    "rloo": {**_SHARED, **_ROLLOUTS, "num_generations": 2, "beta": 0.05},
}
"""The defaults of the settings of each command that are copied or read; a test compares them with the installed TRL."""

OLDER: frozenset[str] = frozenset({"rpo_alpha", "ref_model", "max_prompt_length", "torch_dtype"})
"""Settings with a default here that the installed TRL no longer has; with ``warmup_ratio`` they are still imported."""

OF_ONE: Mapping[str, str] = {
    "dpo": "f_divergence_type f_alpha_divergence_coef loss_weights label_smoothing ld_alpha use_weighting discopop_tau "
    "rpo_alpha",
    "kto": "desirable_weight undesirable_weight",
    "sft": "packing packing_strategy eval_packing completion_only_loss assistant_only_loss dataset_text_field",
    "grpo": "scale_rewards importance_sampling_level use_bias_correction_kl mask_truncated_completions delta "
    "top_entropy_quantile vllm_importance_sampling_correction vllm_importance_sampling_mode entropy_coef",
    "rloo": "normalize_advantages reward_clip_range",
    "reward": "center_rewards_coefficient",
}
"""Settings by which a file without the name of its command is recognized."""
