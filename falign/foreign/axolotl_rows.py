"""Settings of axolotl: their rows and defaults. Settings of its section ``trl`` have a row ``trl.NAME``."""

from __future__ import annotations

from collections.abc import Mapping

from falign.foreign.reasons import CLIPPING, COMPILE, HUB, LOADER, LORA, METRICS, SAMPLING, SAVING, SERVER
from falign.foreign.rows import Row, copied, each, read, refused, unused
from falign.foreign.transformers_rows import TRAINING

__all__ = ["AXOLOTL", "DEFAULTS"]

_TRACKER = "each tracker reads its own environment variables (WANDB_PROJECT, WANDB_NAME ...)"
_TOKENS = "the tokenizer stays as it is; save a model with the tokens first"
_KERNELS = "it is for speed or memory alone"
_ROWS = "rows are read as they are; data.train has path, split, columns, weight and limit"
_PACKING = "rows are not packed: training.tokens_per_batch fills batches"

_MODEL: Mapping[str, Row] = {
    "base_model": copied("model.path"),
    "revision_of_model": copied("model.revision"),
    "trust_remote_code": copied("model.trust_remote_code", convert=bool),
    "dataset_processes": unused("applies to `data` alone", "data.num_proc"),
    "dataset_num_proc": unused("applies to `data` alone", "data.num_proc"),
    **each("base_model_config tokenizer_config", read("model.path", note="which has its own configuration")),
    **each(
        "model_type tokenizer_type tokenizer_use_fast tokenizer_legacy cls_model_config processor_type "
        "tokenizer_use_mistral_common tokenizer_save_jinja_files is_falcon_derived_model is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model experimental_skip_move_to_device device device_map world_size "
        "local_rank max_memory gpu_memory_limit low_cpu_mem_usage lora_on_cpu ddp hf_use_auth_token strict "
        "axolotl_config_path is_preprocess mean_resizing_embeddings shrink_embeddings embeddings_skip_upcast",
        unused("falign finds it out by itself"),
    ),
    "bf16": read("model.dtype"),
    **each("fp16 float16 bfloat16 float32", read("model.dtype")),
    "fp8": refused("training computes in model.dtype", False),
    "load_in_4bit": read("model.quantization"),
    "load_in_8bit": read("model.quantization"),
    "gptq": refused("model.quantization supports nf4 and int8 only", False),
    "bnb_config_kwargs": refused("model.quantization=nf4 has double quantization and computes in bfloat16"),
    **each("qat quantization fp8_config", refused("the weights are trained in model.dtype")),
    **each(
        "flash_attention sdp_attention eager_attention flex_attention attn_implementation xformers_attention",
        read("model.attn_implementation"),
    ),
    "s2_attention": refused("the architecture is that of the checkpoint", False),
    **each("special_tokens", read(note=_TOKENS)),
    "tokens": read("model.new_tokens"),
    **each("added_tokens_overrides resize_token_embeddings_to_32x eot_tokens", refused(_TOKENS, False, [])),
    "chat_template": read("model.chat_template"),
    "chat_template_jinja": copied("model.chat_template"),
    "default_system_message": refused("rows without a system turn have none; model.chat_template may write one"),
}

_ADAPTER: Mapping[str, Row] = {
    "adapter": read("adapter"),
    "lora_model_dir": refused("adapter.init goes on with an adapter, and reference must be chosen with it"),
    "lora_r": read("adapter.r"),
    "lora_alpha": read("adapter.alpha"),
    "lora_dropout": read("adapter.dropout"),
    "lora_target_modules": read("adapter.target_modules"),
    "lora_target_linear": read("adapter.target_modules", note="all-linear"),
    "peft_use_rslora": read("adapter.use_rslora"),
    "peft_use_dora": read("adapter.use_dora"),
    "lora_modules_to_save": read("adapter.modules_to_save"),
    "lora_target_parameters": read("adapter.target_parameters"),
    **each(
        "peft_layers_to_transform peft_layers_pattern peft "
        "peft_layer_replication peft_trainable_token_indices loftq_config",
        refused(LORA, []),
    ),
    "peft_init_lora_weights": read("adapter.init_lora_weights"),
    **each(
        "lora_fan_in_fan_out peft_ensure_weight_tying peft_autocast_adapter_dtype qlora_sharded_model_loading "
        "merge_lora merge_method lora_mlp_kernel lora_qkv_kernel lora_o_kernel",
        unused(_KERNELS),
    ),
    "loraplus_lr_ratio": refused("all parameters have one learning rate"),
    "loraplus_lr_embedding": unused("all parameters have one learning rate"),
    **each("relora relora_steps relora_prune_ratio", refused("one adapter is trained from the first step to the last")),
    "unfrozen_parameters": refused("all weights are trained, or an adapter", []),
}

_DATA: Mapping[str, Row] = {
    "datasets": read("data.train", "prompts.train"),
    "test_datasets": read("data.eval", "prompts.eval"),
    "pretraining_dataset": refused("fine-tuning counts completions behind a prompt; plain texts have none"),
    "val_set_size": read("data.eval_fraction", "data.eval_size", "prompts.eval_size"),
    "sequence_len": read("data.max_length"),
    "excess_length_strategy": read("data.long_prompt", "data.long_completion"),
    "max_prompt_len": read("prompts.max_length"),
    "min_sample_len": refused(_ROWS),
    "dataset_exact_deduplication": refused(_ROWS, False),
    **each("dataset_shard_num dataset_shard_idx", refused(_ROWS)),
    **each(
        "shuffle_merged_datasets dataset_prepared_path dataset_keep_in_memory skip_prepare_dataset push_dataset_to_hub",
        unused(LOADER),
    ),
    "sample_packing": refused(_PACKING, False),
    **each(
        "eval_sample_packing sample_packing_group_size sample_packing_bin_size sample_packing_sequentially "
        "pad_to_sequence_len multipack_real_batches batch_flattening dpo_padding_free sample_packing_eff_est",
        unused(_PACKING),
    ),
    "curriculum_sampling": read("training.extra.train_sampling_strategy"),
    "group_by_length": refused("rows are shuffled in every epoch, by seed", False),
    "train_on_inputs": refused("the loss always counts the tokens of completions only", False),
}

_TRAINING: Mapping[str, Row] = {
    **{
        name: row
        for name, row in TRAINING.items()
        if name
        not in ("bf16", "fp16", "max_steps", "per_device_train_batch_size", "optim", "lr_scheduler_type", "project")
    },
    "max_steps": read("training.max_steps"),
    "micro_batch_size": read("training.per_device_train_batch_size"),
    "gradient_accumulation_steps": read("training.gradient_accumulation_steps"),
    "batch_size": read("training.gradient_accumulation_steps"),
    "eval_batch_size": read("training.per_device_eval_batch_size"),
    "num_epochs": copied("training.num_train_epochs"),
    "optimizer": copied("training.optim"),
    "lr_scheduler": read("training.lr_scheduler_type"),
    **each(
        "cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor",
        refused("lr_scheduler: cosine_with_min_lr with lr_scheduler_kwargs: {min_lr_rate: ...} is such a schedule"),
    ),
    **each("embedding_lr embedding_lr_scale lr_groups", refused("all parameters have one learning rate")),
    "lr_quadratic_warmup": refused("a warm-up is linear", False),
    **each("adam_epsilon2 adam_beta3", refused("no optimizer of transformers has it")),
    "torchdistx_path": unused("falign finds it out by itself"),
    "warmup_steps": read("training.warmup_steps"),
    "warmup_ratio": read("training.warmup_steps"),
    **each("evals_per_epoch saves_per_epoch", unused("training.eval_steps and training.save_steps count steps")),
    **each("eval_table_size eval_max_new_tokens do_causal_lm_eval eval_causal_lm_metrics", unused(METRICS)),
    **each("do_bench_eval bench_dataset bench_split", unused(METRICS)),
    "early_stopping_patience": read("training.early_stopping"),
    **each(
        "loss_watchdog_threshold loss_watchdog_patience", refused("the run stops only if a loss is NaN or infinite")
    ),
    "auto_resume_from_checkpoints": unused(SAVING),
    "save_safetensors": unused(SAVING),
    **each("gc_steps profiler_steps include_tokens_per_second", unused(_KERNELS)),
    "gradient_checkpointing": read("training.gradient_checkpointing"),
    "noisy_embedding_alpha": refused("falign adds no noise to embeddings"),
    **each("use_wandb use_mlflow use_comet use_tensorboard use_trackio", read("training.report_to")),
    **each(
        "wandb_project wandb_entity wandb_watch wandb_name wandb_run_id wandb_log_model wandb_mode "
        "mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts comet_project_name "
        "comet_workspace comet_api_key comet_mode comet_online trackio_project_name",
        unused(_TRACKER),
    ),
    "hub_model_id": unused(HUB),
    **each(
        "flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_fuse_mlp flash_optimum "
        "unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope "
        "liger_rope liger_rms_norm liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy "
        "flex_attn_compile_kwargs llama4_linearized_experts use_kernels heads_k_stride ring_attn_func",
        unused(_KERNELS),
    ),
    **each(
        "sequence_parallel_degree context_parallel_size tensor_parallel_size", refused("a process reads whole rows", 1)
    ),
    "fsdp_version": unused("--launch fsdp2 is FSDP 2"),
    "fsdp_final_state_dict_type": unused(SAVING),
    "plugins": read(note="falign has no plugins; axolotl's for liger and cut_cross_entropy are for speed alone"),
    "cut_cross_entropy": unused("logits of all tokens are never in memory at once"),
    **each("use_pose lisa_n_layers", refused("the architecture and what is trained stay as they are", False)),
}

_METHOD: Mapping[str, Row] = {
    "rl": read("objective.kind"),
    "reward_model": read("objective.kind", note="reward_model"),
    "center_rewards_coefficient": read("objective.centering"),
    "process_reward_model": refused("falign uses reward models of whole completions", False),
    "num_labels": refused("a reward model has one output", 1),
    "rl_beta": read("objective.beta"),
    "dpo_beta": read("objective.beta"),
    "dpo_loss_type": read("objective.margin_loss"),
    "dpo_loss_weights": read("objective.weights"),
    "dpo_label_smoothing": read("objective.margin_loss"),
    "dpo_norm_loss": refused("RPO's scaled loss is not available", False),
    "dpo_use_weighting": refused("WPO is not available", False),
    "dpo_use_logits_to_keep": unused(_KERNELS),
    "precompute_ref_log_probs": unused("a folder", "reference.cache"),
    "rpo_alpha": read("objective.terms", note="with objective.kind=sum, of a pairwise and a supervised term"),
    "orpo_alpha": read(note="ORPO is defined without a reference, which preference objectives have here"),
    "simpo_gamma": read(note="SimPO is defined without a reference, which preference objectives have here"),
    "cpo_alpha": read(note="CPO is defined without a reference, which preference objectives have here"),
    "kto_desirable_weight": read("objective.desirable_weight"),
    "kto_undesirable_weight": read("objective.undesirable_weight"),
    "trainer_cls": refused("a run file has no trainer of its own"),
    "vllm": unused(SERVER),
    "trl": read("rollout", "objective"),
}

_ONLINE: Mapping[str, Row] = {
    "beta": read("objective.beta"),
    "max_completion_length": read("rollout.max_new_tokens"),
    "num_generations": read("rollout.completions"),
    "generation_batch_size": read("rollout.prompts", note="times rollout.completions"),
    "steps_per_generation": read("rollout.minibatches"),
    "num_iterations": read("rollout.updates"),
    "temperature": read("rollout.temperature"),
    "reward_funcs": read("rewards.0.function", note="with rewards.0.kind=function"),
    "reward_weights": read("rewards.0.weight", note="of each reward"),
    "scale_rewards": read("objective.advantage"),
    "loss_type": read("objective.reduction"),
    "epsilon": read("objective.clip_low", note="and objective.clip_high"),
    "epsilon_high": read("objective.clip_high"),
    "importance_sampling_level": read("objective.importance"),
    "use_vllm": read("rollout.engine.kind", note="vllm"),
    **each("vllm_mode vllm_server_host vllm_server_port", read("rollout.engine.url")),
    "vllm_server_timeout": read("rollout.engine.wait"),
    "sync_ref_model": read("reference.kind", note="moving_average"),
    "ref_model_mixup_alpha": read("reference.alpha"),
    "ref_model_sync_steps": read("reference.every"),
    "top_p": refused(SAMPLING, 1.0),
    "top_k": refused(SAMPLING, 0, -1),
    "min_p": refused(SAMPLING, 0.0),
    "repetition_penalty": refused(SAMPLING, 1.0),
    "generation_kwargs": refused(SAMPLING, {}),
    "delta": refused(CLIPPING),
    "mask_truncated_completions": refused("completions cut at the limit count, with the reward that they get", False),
    "multi_objective_aggregation": refused("the reward is the sum of all rewards", "sum_then_normalize"),
    "rollout_func": refused("a completion is one turn, sampled by rollout.engine"),
    **each("log_completions num_completions_to_print", unused("all completions are written to completions.jsonl")),
    **each(
        "vllm_device vllm_gpu_memory_utilization vllm_dtype vllm_max_model_len vllm_enable_prefix_caching "
        "vllm_enable_sleep_mode vllm_tensor_parallel_size",
        unused(SERVER),
    ),
}

AXOLOTL: Mapping[str, Row] = {
    **_TRAINING,
    **_MODEL,
    **_ADAPTER,
    **_DATA,
    **_METHOD,
    **{f"trl.{name}": row for name, row in _ONLINE.items()},
    **each("torch_compile torch_compile_backend torch_compile_mode", unused(COMPILE)),
}
"""Settings by name."""

DEFAULTS: Mapping[str, object] = {
    "output_dir": "./model-out",
    "seed": 42,
    "learning_rate": None,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "batch_size": None,
    "eval_batch_size": None,
    "num_epochs": 1.0,
    "optimizer": "adamw_torch_fused",
    "weight_decay": 0.0,
    "lr_scheduler": "cosine",
    "max_steps": None,
    "warmup_steps": None,
    "warmup_ratio": None,
    "save_steps": None,
    "save_strategy": None,
    "save_total_limit": 4,
    "eval_steps": None,
    "eval_strategy": None,
    "logging_steps": None,
    "gradient_checkpointing": False,
    "bf16": "auto",
    "fp16": None,
    "adapter": None,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "lora_dropout": 0.0,
    "sequence_len": 512,
    "max_prompt_len": 512,
    "excess_length_strategy": "drop",
    "val_set_size": 0.0,
    "datasets": None,
    "test_datasets": None,
    "rl": None,
    "rl_beta": None,
    "chat_template": None,
    "deepspeed": None,
    "fsdp": None,
    "fsdp_config": None,
    **{
        f"trl.{name}": value
        for name, value in {
            "beta": None,
            "max_completion_length": 512,
            "num_generations": 8,
            "num_iterations": 1,
            "temperature": 1.0,
            "scale_rewards": True,
            "loss_type": "dapo",
            "epsilon": 0.2,
            "importance_sampling_level": "token",
            "use_vllm": False,
            "sync_ref_model": False,
            "ref_model_mixup_alpha": 0.9,
            "ref_model_sync_steps": 64,
        }.items()
    },
}
"""Defaults of the settings that are copied or read; the others are None."""
