"""Settings of TRL, transformers and PEFT: the run file's field for each one, or the reason why it has no field."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from falign.choices import similar

__all__ = ["FOREIGN_NAMES", "KINDS_OF_METHODS", "ForeignName", "near_foreign_name"]

KINDS_OF_METHODS = {
    name: kind
    for kind, names in {
        "pairwise": "dpo fdpo f_dpo hdpo h_dpo ipo chipo",
        "unpaired": "kto",
        "token_pairwise": "tdpo sparsepo",
        "supervised": "sft fsft f_sft",
        "policy_gradient": "grpo rloo ppo reinforce dapo",
        "distribution_matching": "fdpg f_dpg",
        "hybrid": "dphrl dph_rl",
        "sequence_match": "sequencematch",
        "distillation": "gkd kd opd",
        "cloning": "best_of_n rft raft",
    }.items()
    for name in names.split()
}
"""The kind of objective that a method's name is looked for under."""


class ForeignName(NamedTuple):
    """The counterpart of another library's setting.

    Attributes:
        fields: Paths of the run file; empty if falign has no such setting.
        note: A remark on the paths; without paths, the reason.
    """

    fields: tuple[str, ...]
    note: str = ""

    def message(self) -> str:
        """Return the last part of a message about the name."""
        if not self.fields:
            return f"falign has no such setting, because {self.note}."
        return f"here it is {' or '.join(self.fields)}{f' ({self.note})' if self.note else ''}."


def near_foreign_name(name: str, rivals: Iterable[str]) -> str | None:
    """Return the foreign name that is nearest to a misspelled one; None if a rival is nearer, or none is near."""
    own = set(rivals)
    close = similar(name, [*own, *FOREIGN_NAMES], cutoff=0.8)
    return close if close not in own else None


def _at(*fields: str, note: str = "") -> ForeignName:
    return ForeignName(fields, note)


def _none(names: str, reason: str) -> dict[str, ForeignName]:
    return dict.fromkeys(names.split(), ForeignName((), reason))


_SAMPLING = "completions are sampled from the whole vocabulary; importance weights cannot correct for tokens left out"
_SERVER = "it is an option of the vLLM server, which you start yourself (docs/vllm.md)"
_SHARDING = "processes are chosen on the command line: falign train RUN.yaml --launch ddp, or --launch fsdp2"
_HUB = "falign does not upload: falign export writes a folder, and hf upload sends it to the Hub"
_TRACKER = "each tracker reads its own environment variables (WANDB_PROJECT, WANDB_NAME ...)"
_LOADER = "all rows are tokenized before the first step, and the training process makes the batches"
_BEST = "the run keeps the model after the last step, and checkpoints in RUN/checkpoint-*"
_ENTROPY = "no objective has an entropy bonus; objective.divergence and objective.beta limit the change of the policy"
_CLIPPING = "no objective clips in this way; objective.clip_low and objective.clip_high bound π/π_old"
_METRICS = "held-out metrics are means over all rows, written to metrics.jsonl"
_LOGGING = "falign prints its own messages and writes all metrics to metrics.jsonl"
_LORA = "adapters are plain LoRA with r, alpha, dropout and target_modules"
_DPO_LOSS = "a run has one margin loss, objective.margin_loss"
_SAVING = "training.save_steps writes whole checkpoints, from which --resume continues"
_COMPILE = "falign does not compile models or change how torch computes"

FOREIGN_NAMES: dict[str, ForeignName] = {
    # Names of several libraries.
    "lr": _at("training.learning_rate"),
    "batch_size": _at("training.per_device_train_batch_size"),
    "train_batch_size": _at("training.per_device_train_batch_size"),
    "use_peft": _at("adapter"),
    "ref_model": _at("reference.path", note="with reference.kind=frozen"),
    # transformers.TrainingArguments
    "activation_checkpointing": _at("training.gradient_checkpointing"),
    "bf16": _at("model.dtype", note="bfloat16"),
    "fp16": _at("model.dtype", note="float16"),
    "data_seed": _at("seed"),
    "do_eval": _at("training.eval_steps"),
    "eval_strategy": _at("training.eval_steps"),
    "save_strategy": _at("training.save_steps"),
    "logging_strategy": _at("training.logging_steps"),
    "logging_first_step": _at("training.logging_steps", note="1 logs every step"),
    "logging_nan_inf_filter": _at("training.skip_bad"),
    "use_liger_kernel": _at("training.chunk_tokens", note="logits of all tokens are never in memory at once"),
    "label_smoothing_factor": _at("objective.margin_loss", note="robust(0.1) or exo(0.001), for pairs"),
    **_none(
        "accelerator_config dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context "
        "dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor "
        "dataset_num_proc length_column_name",
        _LOADER,
    ),
    **_none("remove_unused_columns", "columns beside the prompt stay, because rewards may read them"),
    **_none("train_sampling_strategy shuffle_dataset", "rows are shuffled in every epoch, by seed"),
    **_none(
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
        "falign chooses these options; training.gradient_checkpointing turns it on",
    ),
    **_none("activation_offloading", "activations stay in memory, or training.gradient_checkpointing recomputes them"),
    **_none("adam_beta1", "it is 0.9 in every run"),
    **_none("adam_epsilon", "it is 1e-8 in every run"),
    **_none(
        "auto_find_batch_size",
        "the batch size changes results; training.tokens_per_batch bounds memory",
    ),
    **_none("average_tokens_across_devices", "a loss is always divided by the sum of its weights over all processes"),
    **_none(
        "batch_eval_metrics eval_accumulation_steps eval_do_concat_batches eval_use_gather_object include_for_metrics "
        "prediction_loss_only include_num_input_tokens_seen skip_memory_metrics label_names",
        _METRICS,
    ),
    **_none("bf16_full_eval fp16_full_eval", "evaluation computes in model.dtype, as training does"),
    **_none(
        "ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout "
        "deepspeed fsdp fsdp_config local_rank parallelism_config ds3_gather_for_generation",
        _SHARDING,
    ),
    **_none("debug log_level log_level_replica log_on_each_node disable_tqdm", _LOGGING),
    **_none("do_predict", "falign score and falign evaluate predict, from a run or a model"),
    **_none("do_train", "falign train always trains"),
    **_none("eval_on_start eval_delay", "held-out data are always evaluated before the first step and after the last"),
    **_none("enable_jit_checkpoint save_on_each_node save_only_model", _SAVING),
    **_none(
        "ignore_data_skip restore_callback_states_from_checkpoint",
        "--resume always restores the whole state",
    ),
    **_none("resume_from_checkpoint", "it is an option of the command: falign train RUN.yaml --resume"),
    **_none("full_determinism", "seed determines all random numbers, and torch is left at its own kernels"),
    **_none("greater_is_better load_best_model_at_end metric_for_best_model", _BEST),
    **_none(
        "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy push_to_hub log_completions_hub_repo",
        _HUB,
    ),
    **_none("hub_token", "tokens are read from the environment (HF_TOKEN), not from run files"),
    **_none("liger_kernel_config", "training.chunk_tokens already bounds the logits in memory"),
    **_none("neftune_noise_alpha", "falign adds no noise to embeddings"),
    **_none("optim_args", "optimizers have their own defaults beside learning_rate, weight_decay and adam_beta2"),
    **_none("optim_target_modules", "optimizers that need it (GaLore, APOLLO) are refused"),
    **_none("project run_name trackio_bucket_id trackio_space_id trackio_static_space_id", _TRACKER),
    **_none("tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps", _COMPILE),
    **_none("use_cache", "key-value caches are always used for sampling and never for training"),
    **_none("use_cpu", "the device is the GPU that torch finds, else the CPU: set CUDA_VISIBLE_DEVICES to nothing"),
    # trl.ModelConfig and trl.ScriptArguments
    "model_name_or_path": _at("model.path"),
    "base_model_name_or_path": _at("model.path"),
    "model_revision": _at("model.revision"),
    "model_init_kwargs": _at("model.dtype", "model.attn_implementation", "model.revision"),
    "torch_dtype": _at("model.dtype"),
    "lora_r": _at("adapter.r"),
    "lora_alpha": _at("adapter.alpha"),
    "lora_dropout": _at("adapter.dropout"),
    "lora_target_modules": _at("adapter.target_modules"),
    "load_in_4bit": _at("model.quantization", note="nf4"),
    "bnb_4bit_quant_type": _at("model.quantization", note="nf4"),
    **_none("load_in_8bit", "model.quantization supports nf4 only"),
    **_none("use_bnb_nested_quant", "model.quantization=nf4 always has double quantization"),
    **_none("bnb_4bit_quant_storage", "model.quantization=nf4 always stores and computes in bfloat16"),
    "dataset_name": _at("data.train.0.path", "prompts.train.0.path", note="the second online; lists of sources"),
    "dataset_train_split": _at("data.train.0.split", "prompts.train.0.split"),
    "dataset_test_split": _at("data.eval.0.split", "prompts.eval.0.split"),
    **_none("dataset_config", "data.train.0.path names a file, a folder or a repository with one configuration"),
    **_none("dataset_streaming", _LOADER),
    **_none("ignore_bias_buffers", _SHARDING),
    # peft.LoraConfig
    "use_rslora": _at("adapter.alpha", note="rsLoRA is an alpha that is √r times as large"),
    "layers_to_transform": _at("adapter.target_modules", note="a list of names of modules"),
    "layers_pattern": _at("adapter.target_modules", note="a list of names of modules"),
    "exclude_modules": _at("adapter.target_modules", note="a list of the names that are wanted"),
    "init_lora_weights": _at("adapter.init", note="an adapter on disk; a new one starts with B = 0"),
    **_none(
        "bias modules_to_save lora_modules_to_save rank_pattern alpha_pattern trainable_token_indices loftq_config "
        "eva_config corda_config lora_ga_config use_dora velora_config alora_invocation_tokens use_qalora "
        "qalora_group_size monteclora_config layer_replication lora_bias target_parameters lora_target_parameters "
        "use_bdlora arrow_config kasa_config",
        _LORA,
    ),
    **_none(
        "task_type lora_task_type peft_type auto_mapping peft_version inference_mode fan_in_fan_out runtime_config "
        "ensure_weight_tying megatron_config megatron_core",
        "falign derives it from the model",
    ),
    # trl.DPOConfig and what earlier releases had
    "loss_type": _at(
        "objective.margin_loss",
        "objective.reduction",
        note="logistic for sigmoid; online, sequence_mean for grpo and token_mean for dapo; for KTO's losses "
        "objective.kind=unpaired, with reference_point=zero for apo_zero_unpaired",
    ),
    "f_divergence_type": _at("objective.divergence"),
    "f_alpha_divergence_coef": _at(
        "objective.divergence", note="as alpha(1 - coefficient): TRL's α is 1 minus the paper's"
    ),
    "label_smoothing": _at("objective.margin_loss", note="robust(0.1) or exo(0.001)"),
    "truncation_mode": _at("data.long_prompt", "data.long_completion"),
    "padding_free": _at("training.layout", note="tree has no padding"),
    "precompute_ref_log_probs": _at("reference.cache", note="a folder"),
    "precompute_ref_batch_size": _at("training.per_device_eval_batch_size", note="for reference.cache too"),
    "sync_ref_model": _at("reference.kind", note="moving_average or periodic_reset"),
    "ref_model_mixup_alpha": _at("reference.alpha", note="with reference.kind=moving_average"),
    "ref_model_sync_steps": _at("reference.every", note="with reference.kind=moving_average"),
    "max_prompt_length": _at(
        "data.max_completion_length",
        "prompts.max_length",
        note="the first leaves the rest of data.max_length to the prompt; the second is that of online runs",
    ),
    "ref_adapter_name": _at("reference.path", note="with reference.kind=adapter"),
    "generate_during_eval": _at("sampling.prompts"),
    **_none("reference_free", "preference objectives are defined relative to a reference"),
    **_none("disable_dropout", "dropout of the model is always off; adapter.dropout is the adapter's"),
    **_none("loss_weights", f"{_DPO_LOSS}; sums of losses are not available"),
    **_none("rpo_alpha", f"{_DPO_LOSS}, without a likelihood of the chosen completions added"),
    **_none("ld_alpha", "LD-DPO is not available; objective.length_norm=token is what corrects for length"),
    **_none("use_weighting discopop_tau", f"{_DPO_LOSS}; WPO and DiscoPOP are not available"),
    **_none("router_aux_loss_coef", "falign does not add the auxiliary loss of a router"),
    **_none(
        "pad_to_multiple_of pad_token padding_value label_pad_token_id max_target_length",
        "padding is masked by position and changes no result",
    ),
    **_none(
        "force_use_ref_model model_adapter_name",
        "reference.kind chooses the reference; its default is automatic",
    ),
    # trl.GRPOConfig
    "num_generations": _at("rollout.completions"),
    "num_generations_eval": _at("rollout.evaluation.completions"),
    "max_completion_length": _at(
        "rollout.max_new_tokens",
        "data.max_completion_length",
        note="the second cuts given completions",
    ),
    "generation_batch_size": _at("rollout.prompts", note="times rollout.completions"),
    "steps_per_generation": _at("rollout.minibatches", note="optimizer steps per pass over a rollout"),
    "num_iterations": _at("rollout.updates"),
    "epsilon": _at("objective.clip_low", note="and objective.clip_high, with objective.kind=policy_gradient"),
    "epsilon_high": _at("objective.clip_high"),
    "cliprange": _at("objective.clip_low", note="and objective.clip_high, with objective.kind=policy_gradient"),
    "kl_coef": _at("objective.beta", note="with objective.divergence"),
    "vf_coef": _at("objective.value_coefficient"),
    "importance_sampling_level": _at("objective.importance"),
    "reward_weights": _at("rewards.0.weight", note="of each reward"),
    "reward_funcs": _at("rewards.0.function", note="with rewards.0.kind=function"),
    "scale_rewards": _at("objective.advantage", note="group_normalised or group_centred"),
    "use_vllm": _at("rollout.engine.kind", note="vllm"),
    "vllm_mode": _at("rollout.engine.kind", note="vllm is a server"),
    "vllm_server_base_url": _at("rollout.engine.url"),
    "vllm_server_host": _at("rollout.engine.url"),
    "vllm_server_port": _at("rollout.engine.url"),
    "vllm_server_timeout": _at("rollout.engine.wait"),
    "vllm_importance_sampling_correction": _at("rollout.correction"),
    "vllm_importance_sampling_cap": _at("rollout.correction.cap"),
    "vllm_importance_sampling_clip_max": _at("rollout.correction.cap"),
    "vllm_importance_sampling_mode": _at("objective.importance", note="with rollout.correction"),
    "use_transformers_continuous_batching": _at("rollout.max_batch_tokens"),
    "transformers_continuous_batching_config": _at("rollout.max_batch_tokens"),
    "use_transformers_paged": _at("rollout.max_batch_tokens"),
    **_none("vllm_importance_sampling_clip_min off_policy_mask_threshold", "rollout.correction bounds weights above"),
    **_none("top_p top_k min_p repetition_penalty generation_kwargs", _SAMPLING),
    **_none("cache_implementation", "sampling uses the key-value cache of the model"),
    **_none("chat_template_kwargs", "model.chat_template may set what the template reads"),
    **_none("cast_lm_head_to_fp32", "logits are always converted to float32"),
    **_none(
        "vllm_model_impl vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_max_model_length "
        "vllm_tensor_parallel_size vllm_structured_outputs_regex vllm_group_port",
        _SERVER,
    ),
    **_none(
        "delta sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
        _CLIPPING,
    ),
    **_none("multi_objective_aggregation", "the reward is the sum of all rewards, each times its weight"),
    **_none(
        "mask_truncated_completions",
        "completions cut at the limit count, with the reward that they get",
    ),
    **_none(
        "top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta "
        "entropy_target",
        _ENTROPY,
    ),
    **_none("max_tool_calling_iterations", "a completion is one turn, and falign calls no tools"),
    **_none("use_bias_correction_kl", "the penalty has the divergence's gradient, for off-policy samples too"),
    **_none(
        "log_completions log_multimodal num_completions_to_print log_unique_prompts",
        "all completions are written to completions.jsonl",
    ),
    # trl.KTOConfig, trl.SFTConfig and trl.RewardConfig
    "desirable_weight": _at("objective.desirable_weight", note="with objective.kind=unpaired"),
    "undesirable_weight": _at("objective.undesirable_weight", note="with objective.kind=unpaired"),
    "chat_template_path": _at("model.chat_template"),
    "dataset_text_field": _at("data.train.0.columns"),
    **_none("dataset_kwargs", _LOADER),
    **_none("eos_token", "falign reads stop tokens from the tokenizer, template and generation settings"),
    **_none("packing packing_strategy eval_packing", "rows are not packed: training.tokens_per_batch fills batches"),
    **_none("completion_only_loss assistant_only_loss", "the loss always counts the tokens of completions only"),
    **_none("center_rewards_coefficient", "falign uses reward models and does not train them"),
}
"""Names of other libraries; a name that the run file has in the same place and meaning is left out."""
