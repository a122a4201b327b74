"""Small random models of many families, and an oracle that scores one completion at a time from full logits."""

import warnings

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from falign.scoring import PromptTree

VOCABULARY = 97

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    # Far from uniform predictions, so that a wrong head or a wrong position cannot hide.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

# model_type: what differs from the common configuration. Caps and scales are large enough to matter.
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "phi3": {},
    "olmo2": {},
    "mistral": {"sliding_window": 4},
    "qwen3": {},
    "gemma": {},
    # One layer that sees four tokens, one that sees all.
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}

TREES = [
    PromptTree((5, 6, 7), ((8, 9, 2), (10, 2)), preference=(1.0, 0.0), place="a:1"),
    PromptTree((11,), ((12, 2), (13, 14, 15, 16, 2), (2,)), preference=(2.0, 1.0, 0.0), place="a:2"),
    PromptTree((17, 18, 19, 20, 21, 2, 22), ((2, 2), (23,)), preference=(0.0, 1.0), place="a:3"),
]


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(_COMMON | FAMILIES[family] | overrides))
    return AutoModelForCausalLM.from_config(config)


def with_peft(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that Transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, config)


def with_lora(model: PreTrainedModel, *, seed: int = 1, trained: bool = False, **options) -> PeftModel:
    torch.manual_seed(seed)
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    adapted = with_peft(model, LoraConfig(**options))
    if trained:
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
    return adapted


def dense_logprobs(model: nn.Module, tree: PromptTree) -> list[Tensor]:
    """Log-probabilities of each completion's tokens, each row alone, unpadded, through the model's own logits."""
    rows = []
    for completion in tree.completion_ids:
        ids = torch.tensor([tree.prompt_ids + completion])
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        start = len(tree.prompt_ids)
        rows.append(torch.stack([logits[start + t - 1].log_softmax(-1)[token] for t, token in enumerate(completion)]))
    return rows
