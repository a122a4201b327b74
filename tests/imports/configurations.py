"""Configurations in the style of the documentation of TRL, LLaMA-Factory and axolotl, on tiny models and local data.

``MODEL`` and the names of files stand for what the test writes. Each row has what becomes of it: the fields that decide
the run, or the names that are refused.
"""

from typing import Any, NamedTuple


class Case(NamedTuple):
    library: str
    source: str
    expected: dict[str, Any]  # fields of the run by path
    method: str | None = None
    launch: str = ""
    differs: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


class Refused(NamedTuple):
    library: str
    source: str
    told: tuple[str, ...]
    method: str | None = None


SHORT = "max_steps: 2\nsave_strategy: 'no'\ngradient_checkpointing: false\n"
TRL = f"model_name_or_path: MODEL\noutput_dir: OUT\nbf16: false\n{SHORT}"
FACTORY = f"model_name_or_path: MODEL\noutput_dir: OUT\ndisable_gradient_checkpointing: true\n{SHORT}"
AXOLOTL = "base_model: MODEL\noutput_dir: OUT\nbf16: false\nmax_steps: 2\n"

TRAINED: dict[str, Case] = {
    "trl dpo, LoRA": Case(
        "trl",
        TRL + "dataset_name: pairs.jsonl\nuse_peft: true\nlora_r: 4\nlora_target_modules: [q_proj, v_proj]\n"
        "learning_rate: 5e-6\nwarmup_ratio: 0.1\nlr_scheduler_type: cosine\npush_to_hub: true\nhub_model_id: a/b\n"
        "report_to: none\nrun_name: first\nprecompute_ref_log_probs: true\n",
        {
            "adapter": {"r": 4, "alpha": 32.0, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
            "objective.margin_loss": "logistic",
            "objective.beta": 0.1,
            "data.max_length": 1024,
            "data.long_prompt": "drop",
            "training.learning_rate": 5e-6,
            "training.warmup_steps": 0.1,
            "training.lr_scheduler_type": "cosine",
            "training.per_device_train_batch_size": 8,
            "seed": 42,
        },
        method="dpo",
        unused=("push_to_hub", "hub_model_id", "run_name", "precompute_ref_log_probs"),
    ),
    "trl dpo, alpha-divergence under fsdp": Case(
        "trl",
        TRL + "dataset_name: pairs.jsonl\nf_divergence_type: alpha_divergence\nf_alpha_divergence_coef: 0.3\n"
        "beta: 0.05\nfsdp: full_shard auto_wrap\nfsdp_config: {fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer}\n"
        "dtype: bfloat16\nuse_peft: true\ngradient_accumulation_steps: 2\nper_device_train_batch_size: 4\n",
        {
            "adapter.target_modules": ["q_proj", "v_proj"],
            "model.dtype": "bfloat16",
            "objective.divergence": "alpha(0.7)",
            "objective.beta": 0.05,
            "training.gradient_accumulation_steps": 2,
            "training.learning_rate": 1e-6,
        },
        launch=" --launch fsdp2",
    ),
    "trl dpo, losses with weights and a moving reference": Case(
        "trl",
        TRL + "datasets:\n- path: json\n  data_files: pairs.jsonl\ntest_split_size: 0.25\n"
        "loss_type: [sigmoid_norm, sft]\nloss_weights: [1.0, 0.2]\nbeta: 2.0\nsync_ref_model: true\n"
        "ref_model_sync_steps: 8\neval_strategy: steps\neval_steps: 1\n",
        {
            "objective.terms.sigmoid_norm.length_norm": "token",
            "objective.terms.sft.completions": "chosen",
            "objective.weights": {"sft": 0.2},
            "reference.alpha": 0.6,
            "reference.every": 8,
            "data.eval_fraction": 0.25,
            "training.eval_steps": 1,
        },
        method="dpo",
    ),
    "trl dpo of an older release": Case(
        "trl",
        TRL + "dataset_name: pairs.jsonl\nloss_type: ipo\nmax_length: 64\nmax_prompt_length: 48\nadam_beta1: 0.8\n"
        "torch_dtype: float32\noptim: adamw_torch\nrpo_alpha: 0.5\n",
        {
            "objective.terms.ipo.margin_loss": "ipo",
            "objective.terms.ipo.length_norm": "token",
            "objective.weights": {"sft": 0.5},
            "data.max_completion_length": 16,
            "data.long_prompt": "cut",
            "training.extra": {"adam_beta1": 0.8},
        },
        method="dpo",
        differs=("behind a short prompt",),
    ),
    "trl kto": Case(
        "trl",
        TRL + "dataset_name: labels.jsonl\ndesirable_weight: 1.33\nbeta: 0.2\nmax_length: null\n",
        {
            "objective.kind": "unpaired",
            "objective.reference_point": "mismatched",
            "objective.desirable_weight": 1.33,
            "data.max_length": 2048,  # positions of the model
            "data.long_completion": "error",
        },
        differs=("micro-batch",),
    ),
    "trl sft": Case(
        "trl",
        TRL + "dataset_name: answers.jsonl\ncompletion_only_loss: true\nlearning_rate: 2.0e-4\nuse_peft: true\n"
        "lora_target_modules: all-linear\nuse_rslora: true\nlora_r: 16\nlora_alpha: 8\n",
        {
            "objective.kind": "supervised",
            "adapter.alpha": 8.0,
            "adapter.use_rslora": True,
            "adapter.target_modules": "all-linear",
            "training.learning_rate": 2e-4,
        },
    ),
    "trl reward, the best model": Case(
        "trl",
        TRL + "dataset_name: pairs.jsonl\ncenter_rewards_coefficient: 0.01\nload_best_model_at_end: true\n"
        "datasets: [{path: json, data_files: pairs.jsonl}]\ntest_split_size: 4\neval_strategy: steps\neval_steps: 1\n"
        "metric_for_best_model: eval_rewards/margins\n",
        {
            "objective.kind": "reward_model",
            "objective.centering": 0.01,
            "training.keep_best.metric": "rewards/margins",
            "data.eval_size": 4,
            "training.learning_rate": 1e-4,
        },
    ),
    "trl grpo": Case(
        "trl",
        TRL + "dataset_name: prompts.jsonl\nreward_funcs: [tests.imports.rewards.short]\nreward_weights: [0.5]\n"
        "num_generations: 4\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 2\nsteps_per_generation: 4\n"
        "max_completion_length: 8\nbeta: 0.04\nepsilon_high: 0.28\nscale_rewards: none\nloss_type: dr_grpo\n"
        "use_vllm: true\nlearning_rate: 1e-5\n",
        {
            "rollout.prompts": 4,
            "rollout.completions": 4,
            "rollout.minibatches": 2,
            "rollout.max_new_tokens": 8,
            "training.per_device_train_batch_size": 1,
            "objective.terms.grpo.advantage": "group_centred",
            "objective.terms.grpo.divergence": "reverse_kl",
            "objective.terms.grpo.level": "token",
            "objective.terms.grpo.clip_high": 0.28,
            "objective.terms.grpo.reduction": "sequence_sum",
            "objective.weights": {"grpo": 1 / 8},
        },
        method="grpo",
        differs=("vLLM inside the training process",),
    ),
    "trl rloo": Case(
        "trl",
        TRL + "dataset_name: prompts.jsonl\nreward_funcs: tests.imports.rewards.short\nmax_completion_length: 6\n"
        "normalize_advantages: false\nnum_iterations: 2\n",
        {
            "objective.advantage": "leave_one_out",
            "objective.beta": 0.05,
            "objective.reduction": "sequence_sum",
            "rollout.updates": 2,
            "rollout.prompts": 4,
            "rollout.completions": 2,
        },
        method="rloo",
    ),
    "llamafactory dpo, LoRA": Case(
        "llamafactory",
        FACTORY + "stage: dpo\ndo_train: true\nfinetuning_type: lora\nlora_rank: 8\nlora_target: q_proj,v_proj\n"
        "pref_beta: 0.2\npref_loss: sigmoid\ndpo_label_smoothing: 0.1\ndataset: alpaca_pairs\ntemplate: default\n"
        "cutoff_len: 256\nmax_samples: 12\noverwrite_cache: true\npreprocessing_num_workers: 16\nplot_loss: true\n"
        "overwrite_output_dir: true\nlearning_rate: 5.0e-6\nwarmup_ratio: 0.1\nddp_timeout: 180000000\n"
        "val_size: 0.25\n",
        {
            "adapter": {"r": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
            "objective.margin_loss": "conservative(0.1)",
            "objective.beta": 0.2,
            "data.train.0.format": "alpaca",
            "data.train.0.limit": 12,
            "data.eval_fraction": 0.25,
            "data.max_length": 256,
        },
        differs=("template default",),
        unused=("overwrite_cache", "plot_loss", "ddp_timeout"),
    ),
    "llamafactory dpo, full, ipo under ZeRO-3": Case(
        "llamafactory",
        FACTORY + "stage: dpo\nfinetuning_type: full\npref_loss: ipo\npref_ftx: 0.5\ndataset: turns\n"
        "deepspeed: examples/deepspeed/ds_z3_config.json\nref_model: MODEL\nflash_attn: sdpa\n",
        {
            "adapter": None,
            "objective.terms.dpo.length_norm": "token",
            "objective.weights": {"sft": 0.5},
            "reference.kind": "frozen",
            "data.train.0.format": "sharegpt",
        },
        launch=" --launch fsdp2",
        differs=("ZeRO-3", "pref_ftx"),
    ),
    "llamafactory kto": Case(
        "llamafactory",
        FACTORY + "stage: kto\ndataset: alpaca_labels\nkto_chosen_weight: 1.2\nlora_alpha: 24\nuse_rslora: true\n"
        "lora_rank: 4\n",
        {
            "objective.kind": "unpaired",
            "objective.desirable_weight": 1.2,
            "adapter.alpha": 24.0,
            "adapter.use_rslora": True,
            "adapter.target_modules": "all-linear",
        },
    ),
    "llamafactory rm": Case(
        "llamafactory",
        FACTORY + "stage: rm\ndataset: alpaca_pairs\nlora_target: all\n",
        {"objective.kind": "reward_model", "data.train.0.format": "alpaca"},
    ),
    "llamafactory sft": Case(
        "llamafactory",
        FACTORY + "stage: sft\ndataset: alpaca_answers\nmask_history: true\nneftune_noise_alpha: null\n",
        {
            "objective.kind": "supervised",
            "training.learning_rate": 5e-5,
            "data.train.0.columns": {"completion": "output"},
        },
    ),
    "axolotl dpo": Case(
        "axolotl",
        AXOLOTL + "rl: dpo\nrl_beta: 0.2\ndatasets:\n- path: questions.jsonl\n  ds_type: json\n  split: train\n"
        "  type: chatml.intel\nadapter: lora\nlora_r: 4\nlora_alpha: 8\nlora_target_linear: true\nsequence_len: 256\n"
        "micro_batch_size: 2\ngradient_accumulation_steps: 2\nlearning_rate: 2e-4\nlr_scheduler: cosine\n"
        "warmup_steps: 0\nsample_packing: false\nwandb_project: mine\nval_set_size: 0.25\n",
        {
            "data.train.0.columns": {"prompt": "question"},
            "data.train.0.chat": True,
            "data.long_completion": "drop",
            "data.eval_fraction": 0.25,
            "objective.beta": 0.2,
            "adapter.target_modules": "all-linear",
            "training.per_device_train_batch_size": 2,
            "training.warmup_steps": 0,
        },
        differs=("chatml",),
        unused=("wandb_project",),
    ),
    "axolotl ipo with fields of one's own": Case(
        "axolotl",
        AXOLOTL + "rl: ipo\nrpo_alpha: 0.1\ndatasets:\n- path: questions.jsonl\n  type:\n    field_prompt: question\n"
        "    prompt_format: '{prompt}'\nmicro_batch_size: 2\nbatch_size: 8\nlearning_rate: 1e-5\n"
        "fsdp: [full_shard, auto_wrap]\nexcess_length_strategy: truncate\n",
        {
            "objective.terms.ipo.margin_loss": "ipo",
            "objective.weights": {"sft": 0.1},
            "data.train.0.chat": False,
            "data.long_completion": "cut",
            "training.gradient_accumulation_steps": 4,
            "adapter": None,
        },
        launch=" --launch fsdp2",
    ),
    "axolotl kto": Case(
        "axolotl",
        AXOLOTL.replace("bf16: false\n", "")
        + "rl: kto\nkto_undesirable_weight: 0.5\nremove_unused_columns: false\ndatasets:\n"
        "- path: labels.jsonl\n  type: llama3.prompt_pairs\nmicro_batch_size: 2\ngradient_accumulation_steps: 1\n"
        "learning_rate: 1e-5\nbf16: auto\nadapter: lora\nlora_r: 4\nlora_alpha: 8\npeft_use_dora: true\n",
        {
            "objective.undesirable_weight": 0.5,
            "adapter.use_dora": True,
            "data.train.0.chat": True,
            "model.dtype": "fastest",
        },
    ),
    "axolotl grpo": Case(
        "axolotl",
        AXOLOTL + "rl: grpo\ntrl:\n  beta: 0.001\n  max_completion_length: 6\n  num_generations: 4\n"
        "  reward_funcs: [tests.imports.rewards.short]\n  reward_weights: [1.0]\n  scale_rewards: false\n"
        "datasets:\n- path: prompts.jsonl\nmicro_batch_size: 4\ngradient_accumulation_steps: 1\nlearning_rate: 1e-5\n",
        {
            "rollout.prompts": 1,
            "rollout.completions": 4,
            "rollout.max_new_tokens": 6,
            "objective.advantage": "group_centred",
            "objective.beta": 0.001,
        },
    ),
}

REFUSED: dict[str, Refused] = {
    "trl dpo, MPO": Refused(
        "trl",
        TRL + "dataset_name: pairs.jsonl\nloss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1.0]\n",
        ("loss_type", "bco_pair: BCO classifies"),
    ),
    "trl dpo, everything at once": Refused(
        "trl",
        TRL + "dataset_name: pairs.jsonl\nuse_weighting: true\nld_alpha: 0.5\nneftune_noise_alpha: 5\n"
        "model_init_kwargs: {max_position_embeddings: 8}\nrouter_aux_loss_coef: 0.01\ndisable_dropout: false\n",
        (
            "use_weighting: True",
            "ld_alpha: 0.5",
            "neftune_noise_alpha: 5",
            "max_position_embeddings",
            "router_aux_loss",
        ),
        method="dpo",
    ),
    "trl grpo, GSPO with nucleus sampling": Refused(
        "trl",
        TRL + "dataset_name: prompts.jsonl\nreward_funcs: [a.b]\nimportance_sampling_level: sequence\ntop_p: 0.9\n"
        "temperature: 0.7\nnum_generations: 8\n",
        ("importance_sampling_level: 'sequence'", "top_p: 0.9", "temperature: 0.7"),
    ),
    "trl grpo, CISPO": Refused(
        "trl",
        TRL + "dataset_name: prompts.jsonl\nreward_funcs: [a.b]\nloss_type: cispo\nepsilon_high: 5.0\n",
        ("loss_type: 'cispo'", "CISPO multiplies"),
        method="grpo",
    ),
    "trl sft, packed text": Refused(
        "trl",
        TRL + "dataset_name: pairs.jsonl\npacking: true\ndataset_text_field: content\n",
        ("packing: True", "dataset_text_field: 'content'"),
    ),
    "trl, a name that is wrong": Refused(
        "trl",
        TRL + "dataset_name: pairs.jsonl\nlearning_rat: 1e-5\n",
        ("'learning_rat': did you mean learning_rate?",),
        method="dpo",
    ),
    "llamafactory, SimPO": Refused(
        "llamafactory",
        FACTORY + "stage: dpo\npref_loss: simpo\nsimpo_gamma: 0.5\ndataset: alpaca_pairs\n",
        ("pref_loss: 'simpo'", "defined without a reference"),
    ),
    "llamafactory, ORPO with GaLore": Refused(
        "llamafactory",
        FACTORY + "stage: dpo\npref_loss: orpo\nfinetuning_type: full\nuse_galore: true\nrope_scaling: linear\n"
        "dataset: alpaca_pairs\n",
        ("pref_loss: 'orpo'", "use_galore: True", "rope_scaling: 'linear'"),
    ),
    "llamafactory, PPO": Refused("llamafactory", FACTORY + "stage: ppo\ndataset: alpaca_pairs\n", ("stage: 'ppo'",)),
    "axolotl, ORPO": Refused(
        "axolotl",
        AXOLOTL + "rl: orpo\norpo_alpha: 0.1\nchat_template: chatml\ndatasets:\n- path: pairs.jsonl\n"
        "  type: chat_template.argilla\nmicro_batch_size: 1\nlearning_rate: 1e-5\n",
        ("rl: 'orpo'", "ORPO is defined without a reference"),
    ),
    "axolotl grpo with a function for rows": Refused(
        "axolotl",
        AXOLOTL
        + "rl: grpo\ntrl:\n  num_generations: 4\n  reward_funcs: [a.b]\n  temperature: 0.8\n  rollout_func: a.c\n"
        "datasets:\n- path: prompts.jsonl\n  type: rewards.transform\nmicro_batch_size: 4\nlearning_rate: 1e-5\n",
        ("datasets", "rewards.transform changes rows", "trl.temperature: 0.8", "trl.rollout_func: 'a.c'"),
    ),
    "axolotl sft in Alpaca's prompt": Refused(
        "axolotl",
        AXOLOTL + "datasets:\n- path: pairs.jsonl\n  type: alpaca\nadapter: lora\nlora_r: 8\nlora_alpha: 16\n"
        "lora_target_linear: true\nlearning_rate: 1e-5\nmicro_batch_size: 1\nneftune_noise_alpha: 5\n",
        ("type alpaca of source 0", "neftune_noise_alpha: 5"),
    ),
}
