"""Settings of LLaMA-Factory: their rows and defaults."""

from __future__ import annotations

from collections.abc import Mapping

from falign.foreign.reasons import COMPILE, HUB, LOADER, METRICS, SAVING
from falign.foreign.rows import Row, copied, each, read, refused, unused
from falign.foreign.transformers_rows import TRAINING, TRAINING_DEFAULTS

__all__ = ["DEFAULTS", "LLAMAFACTORY"]

_TRACKER = "each tracker reads its own environment variables (WANDB_PROJECT, WANDB_NAME ...)"
_OPTIMIZER = "training.optim names the optimizer; those that train chosen modules or blocks are refused"
_VISION = "falign trains language models, without pictures, sound or video"

_MODEL: Mapping[str, Row] = {
    "model_name_or_path": copied("model.path"),
    "adapter_name_or_path": read("adapter.init"),
    "model_revision": read("model.revision"),
    "trust_remote_code": copied("model.trust_remote_code"),
    "flash_attn": read("model.attn_implementation"),
    "quantization_bit": read("model.quantization"),
    "quantization_type": read("model.quantization"),
    "quantization_method": read("model.quantization"),
    "double_quantization": read("model.quantization"),
    "infer_dtype": unused("it is the dtype of inference"),
    "preprocessing_num_workers": unused("applies to `data` alone", "data.num_proc"),
    **each(
        "cache_dir use_fast_tokenizer low_cpu_mem_usage offload_folder use_kv_cache infer_backend print_param_status "
        "adapter_folder quantization_device_map",
        unused("it changes where or how things are loaded, not what is trained"),
    ),
    **each("hf_hub_token ms_hub_token om_hub_token", unused("tokens are read from the environment (HF_TOKEN)")),
    **each("use_unsloth use_unsloth_gc enable_liger_kernel use_reentrant_gc use_v1_kernels", unused(COMPILE)),
    "disable_gradient_checkpointing": read("training.gradient_checkpointing"),
    **each(
        "new_special_tokens_config split_special_tokens",
        refused("the tokenizer stays as it is; save a model with the tokens first", False),
    ),
    **each("add_tokens add_special_tokens", read("model.new_tokens")),
    "resize_vocab": unused("model.new_tokens adds rows to the embeddings"),
    "init_special_tokens": unused("no tokens are added"),
    **each("rope_scaling mixture_of_depths", refused("the architecture is that of the checkpoint")),
    **each("shift_attn train_from_scratch", refused("the model is that of the checkpoint", False)),
    "moe_aux_loss_coef": refused("falign does not add the auxiliary loss of a router"),
    **each("upcast_layernorm upcast_lmhead_output", unused("logits are always converted to float32")),
    **each("fp8 fp8_enable_fsdp_float8_all_gather", refused("training computes in model.dtype", False)),
    "fp8_backend": unused("training computes in model.dtype"),
    **each(
        "export_dir export_size export_device export_quantization_bit export_quantization_dataset "
        "export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id",
        unused("falign export writes models"),
    ),
    **each(
        "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels "
        "video_fps video_maxlen use_audio_in_video audio_sampling_rate media_dir freeze_vision_tower "
        "freeze_multi_modal_projector",
        unused(_VISION),
    ),
    "freeze_language_model": refused(_VISION, False),
}

_DATA: Mapping[str, Row] = {
    "template": read("model.chat_template"),
    "dataset": read("data.train"),
    "eval_dataset": read("data.eval"),
    "dataset_dir": read("data.train"),
    "cutoff_len": copied("data.max_length"),
    "max_samples": read("data.train.0.limit"),
    "val_size": read("data.eval_size", "data.eval_fraction"),
    "train_on_prompt": refused("the loss always counts the tokens of completions only", False),
    "mask_history": read(note="the loss counts the last turn"),
    "streaming": refused(LOADER, False),
    "mix_strategy": refused("rows of all sources follow each other; data.train.0.weight gives shares", "concat"),
    "interleave_probs": refused("rows of all sources follow each other; data.train.0.weight gives shares"),
    **each(
        "buffer_size overwrite_cache preprocessing_batch_size tokenized_path "
        "eval_num_beams ignore_pad_token_for_loss data_shared_file_system",
        unused(LOADER),
    ),
    "eval_on_each_dataset": unused(METRICS),
    **each(
        "packing neat_packing",
        refused("rows are not packed: training.tokens_per_batch fills batches", False),
    ),
    "tool_format": refused("tools are rendered by the tokenizer's chat template"),
    "default_system": refused("rows without a system turn have none; model.chat_template may write one"),
    "enable_thinking": refused("model.chat_template may set what the template reads", True),
}

_METHOD: Mapping[str, Row] = {
    "stage": read("objective.kind"),
    "finetuning_type": read("adapter"),
    "lora_rank": read("adapter.r"),
    "lora_alpha": read("adapter.alpha"),
    "lora_dropout": read("adapter.dropout"),
    "lora_target": read("adapter.target_modules"),
    "use_rslora": read("adapter.use_rslora"),
    "use_dora": read("adapter.use_dora"),
    "additional_target": read("adapter.modules_to_save"),
    "create_new_adapter": refused("adapter.init goes on with an adapter; merge it first to train another", False),
    "pissa_init": read("adapter.init_lora_weights"),
    "pissa_iter": read("adapter.init_lora_weights"),
    "pissa_convert": unused("falign export writes plain LoRA"),
    "loraplus_lr_ratio": refused("all parameters have one learning rate"),
    "loraplus_lr_embedding": unused("all parameters have one learning rate"),
    **each(
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules module_dropout oft_rank oft_block_size "
        "oft_target",
        read(note="all weights are trained, or LoRA adapters"),
    ),
    "pref_beta": read("objective.beta"),
    "pref_loss": read("objective.margin_loss"),
    "pref_ftx": read("objective.terms", note="with objective.kind=sum, of a pairwise and a supervised term"),
    "pref_bco_weight": refused("BCO classifies completions by their own reward", 0.0),
    "dpo_label_smoothing": read("objective.margin_loss", note="conservative(0.1)"),
    "simpo_gamma": read(note="SimPO is defined without a reference, which preference objectives have here"),
    "kto_chosen_weight": read("objective.desirable_weight"),
    "kto_rejected_weight": read("objective.undesirable_weight"),
    "ld_alpha": refused("LD-DPO is not available; objective.length_norm=token is what corrects for length", 1.0),
    "ref_model": read("reference.path", note="with reference.kind=frozen"),
    "ref_model_adapters": refused("reference.kind=frozen is a whole model; falign export --format merged makes one"),
    "ref_model_quantization_bit": read("reference.quantization"),
    **each(
        "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards reward_model reward_model_adapters "
        "reward_model_quantization_bit reward_model_type",
        read(note="PPO of LLaMA-Factory has other settings; configs/ppo-arithmetic.yaml has a value head"),
    ),
    **each("use_galore use_apollo use_badam use_adam_mini use_muon use_llama_pro use_mca", refused(_OPTIMIZER, False)),
    **each(
        "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise apollo_target "
        "apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_layerwise "
        "apollo_scale_type apollo_scale_front badam_mode badam_start_block badam_switch_mode badam_switch_interval "
        "badam_update_ratio badam_mask_mode badam_verbose",
        read(note=_OPTIMIZER),
    ),
    "pure_bf16": read("model.dtype", note="bfloat16"),
    "use_dft_loss": refused("fine-tuning has the loss nll", False),
    "disable_shuffling": refused("rows are shuffled in every epoch, by seed", False),
    "early_stopping_steps": read("training.early_stopping"),
    **each("compute_accuracy plot_loss include_effective_tokens_per_second", unused(METRICS)),
    **each(
        "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir "
        "swanlab_lark_webhook_url swanlab_lark_secret",
        unused(_TRACKER),
    ),
}

_REST: Mapping[str, Row] = {
    "overwrite_output_dir": unused("a run needs a folder of its own, output_dir"),
    "predict_with_generate": unused("falign score and falign evaluate predict, from a run or a model"),
    **each(
        "generation_max_length generation_num_beams do_sample temperature top_p top_k num_beams max_length "
        "max_new_tokens repetition_penalty length_penalty skip_special_tokens",
        unused("it is a setting of answers; falign sample has its own"),
    ),
    **each(
        "ray_run_name ray_storage_path ray_storage_filesystem ray_num_workers resources_per_worker placement_strategy "
        "ray_init_kwargs",
        refused("falign does not start runs through Ray"),
    ),
    "save_safetensors": unused(SAVING),
    "hub_model_id": unused(HUB),
}

LLAMAFACTORY: Mapping[str, Row] = {**TRAINING, **_MODEL, **_DATA, **_METHOD, **_REST}
"""Settings by name."""

DEFAULTS: Mapping[str, object] = {
    **TRAINING_DEFAULTS,
    "trust_remote_code": False,
    "output_dir": "trainer_output",
    "model_name_or_path": None,
    "adapter_name_or_path": None,
    "model_revision": "main",
    "flash_attn": "auto",
    "quantization_bit": None,
    "quantization_type": "nf4",
    "quantization_method": "bnb",
    "double_quantization": True,
    "disable_gradient_checkpointing": False,
    "template": None,
    "dataset": None,
    "eval_dataset": None,
    "dataset_dir": "data",
    "cutoff_len": 2048,
    "max_samples": None,
    "val_size": 0.0,
    "mask_history": False,
    "stage": "sft",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "lora_target": "all",
    "use_rslora": False,
    "use_dora": False,
    "additional_target": None,
    "pissa_init": False,
    "pissa_iter": 16,
    "pref_beta": 0.1,
    "pref_loss": "sigmoid",
    "pref_ftx": 0.0,
    "dpo_label_smoothing": 0.0,
    "kto_chosen_weight": 1.0,
    "kto_rejected_weight": 1.0,
    "ref_model": None,
    "ref_model_quantization_bit": None,
    "pure_bf16": False,
    "early_stopping_steps": None,
}
"""Defaults of the settings that are copied or read."""
