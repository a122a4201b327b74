"""What may be served as an adapter over a server's base model."""

import pytest
from peft import IA3Config, LoraConfig, get_peft_model

from falign.models import add_lora
from falign.rollouts.vllm_adapters import why_not_servable
from tests.models.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def adapted(**options):
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj"], **options})
    return get_peft_model(tiny_model("qwen2"), config)


@pytest.mark.parametrize("rslora", [False, True])
def test_plain_lora_up_to_the_servers_rank_is_served(rslora):
    model = add_lora(tiny_model("llama"), r=8, alpha=12.5, seed=0, rslora=rslora)
    assert why_not_servable(model, max_rank=8) is None
    assert "the rank of model.layers.0.self_attn.q_proj, 8, is above" in why_not_servable(model, max_rank=7)
    assert "serves no adapters" in why_not_servable(model, max_rank=0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"init_lora_weights": "olora"}, "changes the base model"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens"]}, "ends of the model"),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 32}}, "32, is above"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_more_than_lora_is_not(options, reason):
    assert reason in why_not_servable(adapted(**options), max_rank=16)


def test_nor_is_what_is_no_lora_or_several_adapters_or_scaled_by_hand():
    assert "no adapter" in why_not_servable(tiny_model("llama"), max_rank=16)
    ia3 = get_peft_model(tiny_model("llama"), IA3Config(task_type="CAUSAL_LM"))
    assert "IA3" in why_not_servable(ia3, max_rank=16)
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    assert "2 adapters are active" in why_not_servable(model, max_rank=16)
    model = adapted()
    model.get_base_model().model.layers[1].self_attn.q_proj.set_scale("default", 3)
    assert "model.layers.1.self_attn.q_proj is scaled by" in why_not_servable(model, max_rank=16)


def test_other_scales_and_ranks_per_layer_are_served():
    model = adapted(rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 3})
    assert why_not_servable(model, max_rank=16) is None
