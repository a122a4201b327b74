"""Settings of ``peft.LoraConfig``."""

from __future__ import annotations

from collections.abc import Mapping

from falign.foreign.reasons import LORA
from falign.foreign.rows import Row, each, read, refused, unused

__all__ = ["LORA_CONFIG"]

LORA_CONFIG: Mapping[str, Row] = {
    "use_peft": read("adapter"),
    "lora_r": read("adapter.r"),
    "lora_alpha": read("adapter.alpha"),
    "lora_dropout": read("adapter.dropout"),
    "lora_target_modules": read("adapter.target_modules"),
    "use_rslora": read("adapter.use_rslora"),
    "use_dora": read("adapter.use_dora"),
    "rank_pattern": read("adapter.rank_pattern"),
    "alpha_pattern": read("adapter.alpha_pattern"),
    "init_lora_weights": read("adapter.init_lora_weights", note="adapter.init is an adapter on disk"),
    **each("modules_to_save lora_modules_to_save", read("adapter.modules_to_save")),
    **each("target_parameters lora_target_parameters", read("adapter.target_parameters")),
    **each("layers_to_transform layers_pattern", read("adapter.target_modules", note="a list of names of modules")),
    "exclude_modules": read("adapter.target_modules", note="a list of the names that are wanted"),
    **each(
        "bias trainable_token_indices loftq_config eva_config corda_config lora_ga_config velora_config "
        "alora_invocation_tokens qalora_group_size monteclora_config layer_replication arrow_config kasa_config",
        refused(LORA),
    ),
    **each("use_qalora lora_bias use_bdlora", refused(LORA, False)),
    **each(
        "task_type lora_task_type peft_type auto_mapping peft_version inference_mode fan_in_fan_out runtime_config "
        "ensure_weight_tying megatron_config megatron_core",
        unused("falign derives it from the model"),
    ),
}
"""Settings by name, under their names in PEFT and in TRL's model arguments."""
