"""Settings of ``transformers.TrainingArguments``, which TRL and LLaMA-Factory have, too."""

from __future__ import annotations

from collections.abc import Mapping

from falign.foreign.reasons import (
    COMPILE,
    HUB,
    LOADER,
    LOGGING,
    METRICS,
    SAVING,
    SHARDING,
)
from falign.foreign.rows import Row, copied, each, read, refused, unused

__all__ = ["TRAINING", "TRAINING_DEFAULTS"]


def extra(name: str, remark: str) -> Row:
    """Return the row of an argument that changes no step, and that ``training.extra`` takes."""
    return unused(remark, f"training.extra.{name}")


TRAINING: Mapping[str, Row] = {
    "output_dir": copied("output_dir"),
    "seed": copied("seed"),
    "learning_rate": copied("training.learning_rate"),
    "lr": read("training.learning_rate"),
    "per_device_train_batch_size": read("training.per_device_train_batch_size"),
    "batch_size": read("training.per_device_train_batch_size"),
    "train_batch_size": read("training.per_device_train_batch_size"),
    "per_device_eval_batch_size": copied("training.per_device_eval_batch_size"),
    "gradient_accumulation_steps": read("training.gradient_accumulation_steps"),
    "num_train_epochs": copied("training.num_train_epochs"),
    "max_steps": copied("training.max_steps", convert=lambda value: value if value > 0 else -1),
    "optim": copied("training.optim"),
    "weight_decay": copied("training.weight_decay"),
    "adam_beta2": copied("training.adam_beta2"),
    "max_grad_norm": copied("training.max_grad_norm"),
    "lr_scheduler_type": copied("training.lr_scheduler_type"),
    "lr_scheduler_kwargs": copied("training.lr_scheduler_kwargs", convert=lambda value: value or {}),
    "warmup_steps": read("training.warmup_steps"),
    "warmup_ratio": read("training.warmup_steps", note="a share of all steps if below 1"),
    "gradient_checkpointing": copied("training.gradient_checkpointing", convert=bool),
    "activation_checkpointing": copied("training.gradient_checkpointing", convert=bool),
    "report_to": read("training.report_to"),
    "bf16": read("model.dtype", note="bfloat16"),
    "fp16": read("model.dtype", note="float16"),
    "eval_strategy": read("training.eval_steps"),
    "eval_steps": read("training.eval_steps"),
    "save_strategy": read("training.save_steps"),
    "save_steps": read("training.save_steps"),
    "save_total_limit": copied("training.save_total_limit"),
    "logging_steps": read("training.logging_steps"),
    "logging_strategy": unused("metrics.jsonl has a line at each of these steps", "training.logging_steps"),
    "logging_first_step": extra("logging_first_step", "it changes metrics.jsonl alone"),
    "logging_nan_inf_filter": unused("a step with NaN stops the run, or is skipped and counted", "training.skip_bad"),
    "do_eval": unused("evaluation follows from held-out data", "training.eval_steps"),
    "data_seed": unused("one seed determines all random numbers", "seed"),
    "use_liger_kernel": unused("logits of all tokens are never in memory at once", "training.chunk_tokens"),
    "label_smoothing_factor": read("objective.margin_loss", note="conservative(0.1), robust(0.1) or exo(0.001)"),
    "dataset_num_proc": unused("applies to `data` alone", "data.num_proc"),
    **each(
        "accelerator_config dataloader_in_order dataloader_multiprocessing_context "
        "dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor "
        "length_column_name",
        unused(LOADER),
    ),
    "dataloader_drop_last": refused("an epoch has all rows, and its last batch those that are left", False),
    "remove_unused_columns": unused("columns beside the prompt stay, because rewards may read them"),
    "train_sampling_strategy": copied("training.extra.train_sampling_strategy", "random or sequential"),
    "shuffle_dataset": unused("rows are shuffled in every epoch, by seed"),
    **each(
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
        unused("falign chooses these options; training.gradient_checkpointing turns it on"),
    ),
    "activation_offloading": unused("activations stay in memory, or training.gradient_checkpointing recomputes them"),
    "adam_beta1": copied("training.extra.adam_beta1"),
    "adam_epsilon": copied("training.extra.adam_epsilon"),
    "auto_find_batch_size": refused("the batch size changes results; training.tokens_per_batch bounds memory", False),
    "average_tokens_across_devices": unused("a loss is always divided by the sum of its weights over all processes"),
    **each(
        "batch_eval_metrics eval_accumulation_steps eval_do_concat_batches eval_use_gather_object include_for_metrics "
        "prediction_loss_only include_num_input_tokens_seen skip_memory_metrics label_names",
        unused(METRICS),
    ),
    **each("bf16_full_eval fp16_full_eval", unused("evaluation computes in model.dtype, as training does")),
    **each(
        "ddp_backend ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph ddp_timeout "
        "local_rank ds3_gather_for_generation",
        unused(SHARDING),
    ),
    **each("deepspeed fsdp fsdp_config", read(note=SHARDING)),
    "parallelism_config": refused(SHARDING),
    **each("debug log_level_replica log_on_each_node disable_tqdm", unused(LOGGING)),
    "do_predict": unused("falign score and falign evaluate predict, from a run or a model"),
    "do_train": refused("falign train always trains", True, False),
    "eval_on_start": unused("held-out data are always evaluated before the first step and after the last"),
    **each("enable_jit_checkpoint save_on_each_node save_only_model", unused(SAVING)),
    **each(
        "ignore_data_skip restore_callback_states_from_checkpoint", unused("--resume always restores the whole state")
    ),
    "resume_from_checkpoint": refused("it is an option of the command: falign train RUN.yaml --resume", False),
    "full_determinism": copied("training.extra.full_determinism"),
    "load_best_model_at_end": read("training.keep_best"),
    "metric_for_best_model": read("training.keep_best"),
    "greater_is_better": read("training.keep_best.greater_is_better"),
    **each(
        "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy push_to_hub log_completions_hub_repo",
        unused(HUB),
    ),
    "hub_token": unused("tokens are read from the environment (HF_TOKEN), not from run files"),
    "liger_kernel_config": unused("training.chunk_tokens already bounds the logits in memory"),
    "neftune_noise_alpha": refused("falign adds no noise to embeddings"),
    "optim_args": copied("training.extra.optim_args"),
    "optim_target_modules": refused("optimizers that need it (GaLore, APOLLO) are refused"),
    **{
        name: extra(name, "in the tracker alone")
        for name in ("project", "run_name", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id")
    },
    **{
        name: extra(name, "for speed or memory alone")
        for name in ("dataloader_pin_memory", "ddp_bucket_cap_mb", "tf32", "torch_empty_cache_steps")
    },
    "eval_delay": extra("eval_delay", "held-out data are also evaluated before the first step"),
    "log_level": extra("log_level", "of messages of transformers"),
    **each("torch_compile torch_compile_backend torch_compile_mode", unused(COMPILE)),
    "use_cache": unused("key-value caches are always used for sampling and never for training"),
    "use_cpu": unused("the device is the GPU that torch finds, else the CPU: set CUDA_VISIBLE_DEVICES to nothing"),
}
"""Settings by name; a test checks that each field of the installed class has a row."""

TRAINING_DEFAULTS: Mapping[str, object] = {
    "seed": 42,
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "gradient_checkpointing": None,
    "report_to": "none",
    "bf16": False,
    "fp16": False,
    "eval_strategy": "no",
    "eval_steps": None,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "logging_steps": 500,
    "label_smoothing_factor": 0.0,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "greater_is_better": None,
    "deepspeed": None,
    "fsdp": None,
    "fsdp_config": None,
}
"""Defaults of the settings that are copied or read."""
