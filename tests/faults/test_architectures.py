"""Tiny models of many architectures: each is scored as it is, or refused by a message with a remedy.

What falign reads of a model (its backbone, head, attention masks) has another form in each architecture, and there are
some that no configuration announces. Here each is built with random weights, saved, loaded, given an adapter, tried,
and takes one gradient.
"""

import logging
import re

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from falign.errors import FalignError
from falign.models import add_lora, load_model
from falign.models.execution import disable_dropout
from falign.scoring import LAYOUTS, PromptTree, check_head, choose_layout, completion_scores

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8, "sliding_window": 16, "d_ff": 48},
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_ctx": 128, "n_inner": 48, "rotary_dim": 8},
    **{"d_model": 32, "num_layers": 2, "ffn_dim": 48, "decoder_layers": 2, "decoder_attention_heads": 4, "n_layers": 2},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
    **{"moe_intermediate_size": 16, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "topk_method": "greedy", "n_heads": 4},
    **{"embedding_size": 32, "input_embedding_size": 16, "output_embedding_size": 24, "state_size": 8, "num_heads": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
TREES = [PromptTree((5, 6, 7), ((8, 9, 10), (11, 12))), PromptTree((5, 9), ((8, 9, 13, 4), (21, 12, 3)))]
EAGER = r"attn_implementation: eager"

# The layout that is chosen for each, or a part of the message that refuses it.
SDPA = {
    **dict.fromkeys(["llama", "deepseek_v2", "minicpm3", "gemma3_text", "gpt_neox", "opt", "phi", "cohere"], "tree"),
    **dict.fromkeys(["falcon", "phimoe"], "tree"),
    **dict.fromkeys(["doge", "bart", "bailing_hybrid", "qwen3_next", "jamba", "kimi_linear", "llama4_text"], "padded"),
    **dict.fromkeys(["gpt_oss", "bloom", "openai-gpt", "rembert", "gptj", "mpt", "mamba", "gemma2"], EAGER),
    **dict.fromkeys(["electra", "bert", "bert-generation", "roberta", "camembert"], "not causal.*is_decoder: true"),
    "modernbert-decoder": "differ from its own logits",
}
WITH_EAGER = {
    **dict.fromkeys(["gpt_oss", "doge", "gptj", "gemma2", "codegen"], "tree"),
    **dict.fromkeys(["bloom", "openai-gpt", "mpt", "rwkv"], "padded"),
    "rembert": "RemBertForCausalLM cannot be scored",
    "mamba": "MambaForCausalLM cannot have this adapter.*target_modules",
}
CASES = [(kind, "sdpa", expected) for kind, expected in SDPA.items()]
CASES += [(kind, "eager", expected) for kind, expected in WITH_EAGER.items()]


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    """Logs tell of kernels that are not installed, and of encoders that are not decoders."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def save(kind, folder):
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    sizes = {name: value for name, value in SIZES.items() if name in vars(default) or name in default.attribute_map}
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = 4
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_class(**sizes)).save_pretrained(folder)
    return folder


def scored(folder, attention):
    """Return the layout that a policy is trained in, after a gradient that reaches its adapter."""
    model = load_model(folder, attn_implementation=attention)
    disable_dropout(model)
    model = add_lora(model, r=2, alpha=4, seed=0)
    check_head(model, (5, 6, 7, 8, 9, 10, 11))
    layout = choose_layout(model, TREES, pad_token_id=0).layout
    completion_scores(model.train(), LAYOUTS[layout](TREES, pad_token_id=0)).logprobs.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    return layout


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "attention", "expected"), CASES, ids=[f"{kind}-{how}" for kind, how, _ in CASES])
def test_each_architecture_takes_a_step_or_is_refused_with_a_message(tmp_path, kind, attention, expected):
    folder = save(kind, tmp_path / kind)
    if expected in ("tree", "padded"):
        assert scored(folder, attention) == expected
        return
    with pytest.raises(FalignError) as refused:
        scored(folder, attention)
    assert re.search(expected, str(refused.value)), str(refused.value)
    assert attention == "sdpa" or not re.search(EAGER, str(refused.value)), "it is eager already"
