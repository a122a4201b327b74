"""The base under adapters has the names, weights and hash of the model without them, or is refused."""

import pytest
import torch
from peft import LoraConfig
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from falign.errors import ConfigError, ModelError
from falign.models import add_lora, load_model, weights_hash
from falign.models.adapter_copies import add_copy
from falign.models.base_weights import base_weights
from falign.models.structure import lora_layers
from falign.references import AdapterOff, AdapterReference
from falign.scoring import LAYOUTS
from tests.models.tiny import VOCABULARY, save_tiny, tiny_model
from tests.scoring.models import TREES, with_peft

BATCH = LAYOUTS["padded"](TREES, pad_token_id=2)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def moe(kind="mixtral"):
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, head_dim=8, mlp_only_layers=[1])).eval()


def peft_model(model, **options):
    options = {"target_modules": ["q_proj"]} | options
    return with_peft(model, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, **options))


WRAPPERS = {
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "tokens": {"trainable_token_indices": [5, 7]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "parameters": {"target_parameters": ["self_attn.k_proj.weight"]},
}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("options", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_wraps_it_the_base_has_its_own_names_and_weights(kind, options):
    expected = list(base_weights(tiny_model(kind)))
    found = list(base_weights(peft_model(tiny_model(kind), **options)))
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_mixture_of_experts_keeps_its_hash_under_pefts_adapter_and_under_ours(kind):
    expected = weights_hash(moe(kind))
    assert weights_hash(peft_model(moe(kind), target_modules="all-linear")) == expected
    ours = add_lora(moe(kind), r=2, alpha=4, seed=0)
    assert weights_hash(ours) == expected
    assert {name.rpartition(".")[2] for name in lora_layers(ours, "default")} >= {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert not any("expert" in name or name.endswith("gate") for name in lora_layers(ours, "default"))


def test_targets_that_peft_takes_for_experts_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"PEFT applies \['down_proj', 'gate_proj', 'up_proj'\] to the experts"):
        add_lora(moe("qwen3_moe"), r=2, alpha=4, seed=0, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])


STARTS = ["pissa", "pissa_niter_2", "olora"]


@pytest.mark.parametrize("start", STARTS)
def test_a_base_that_an_adapter_has_changed_is_refused_by_all_who_ask_for_it(start):
    policy = peft_model(tiny_model("llama"), init_lora_weights=start)
    for ask in (
        lambda: weights_hash(policy),
        lambda: AdapterOff().logprobs(policy, BATCH),
        lambda: AdapterReference(adapter="default").logprobs(policy, BATCH),
    ):
        with pytest.raises(ModelError, match=f"init_lora_weights='{start}' subtracts the adapter's initial update"):
            ask()
    with pytest.raises(ModelError, match="changes its base"):
        add_copy(policy)


def test_so_are_biases_of_the_base_repeated_layers_and_merged_adapters():
    for options, reason in (
        ({"bias": "all"}, "replaces the base's own biases"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
    ):
        with pytest.raises(ModelError, match=reason):
            weights_hash(peft_model(tiny_model("llama"), **options))
    merged = add_lora(tiny_model("llama"), r=2, alpha=4, seed=0)
    merged.merge_adapter()
    with pytest.raises(ModelError, match=r"q_proj has default merged into the base's weights: unmerge it first"):
        weights_hash(merged)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trained_tokens_modules_and_settings_count_for_the_hash_of_an_adapter(tmp_path):
    folder = save_tiny(tmp_path / "m")

    def hash_of(change=None, **options):
        torch.manual_seed(3)
        model = peft_model(load_model(folder), **options)
        for name, parameter in model.named_parameters():
            if change is not None and change in name:
                parameter.data[0, 0] += 1e-3
        return weights_hash(model, adapter="default")

    tokens = {"trainable_token_indices": [5, 7]}
    assert hash_of(**tokens) == hash_of(**tokens) != hash_of("trainable_tokens_delta", **tokens)
    assert hash_of(trainable_token_indices=[5, 8]) != hash_of(**tokens)
    saved = {"modules_to_save": ["lm_head"]}
    assert hash_of(**saved) == hash_of(**saved) != hash_of("lm_head.modules_to_save", **saved)
