"""Whole weights for a server are those of a plain model that computes what the policy does, whatever wraps its base."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from falign.errors import ConfigError
from falign.models import add_lora, load_model
from falign.rollouts.gap import perturbed
from falign.rollouts.vllm_merged import MergedSync, merged_weights
from tests.models.test_base_weights import moe
from tests.models.tiny import save_tiny, tiny_model
from tests.scoring.models import with_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

IDS = torch.tensor([[0, 40, 60, 61, 70, 80, 5, 7]])
WRAPPERS = {
    "LoRA": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "DoRA": ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "one parameter": ("llama", {"target_parameters": ["self_attn.k_proj.weight"]}),
    "experts": ("mixtral", {"target_modules": "all-linear"}),
    "other experts": ("qwen3_moe", {"target_modules": "all-linear"}),
}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def policy_of(kind, options):
    """A model under an adapter that is away from its start."""
    base = moe(kind) if kind in ("mixtral", "qwen3_moe") else tiny_model(kind)
    torch.manual_seed(1)
    policy = with_peft(base, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, **options))
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "lora_" not in name):
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return policy


def sent(policy, folder):
    MergedSync.write(None, policy, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("kind", "options"), WRAPPERS.values(), ids=WRAPPERS)
def test_they_are_the_policys(tmp_path, kind, options):
    policy = policy_of(kind, options)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    expected = logits(policy)
    assert (expected - logits(policy.get_base_model())).abs().max() < 1e-5  # the adapters act in the base
    torch.testing.assert_close(logits(sent(policy, tmp_path / "m")), expected, rtol=0, atol=1e-5)
    after = policy.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("qwen2", {"target_modules": ["q_proj", "lm_head"]}, "lm_head has an adapter and shares its weights with the"),
        ("qwen2", {"target_modules": ["embed_tokens"]}, "embed_tokens has an adapter and shares its weights with the"),
        (
            "llama",
            {"target_modules": ["q_proj"], "trainable_token_indices": [5]},
            "embed_tokens has a TrainableTokensLayer",
        ),
    ],
    ids=["tied head", "tied embeddings", "tokens"],
)
def test_what_a_checkpoint_of_the_base_cannot_hold_is_refused(kind, options, reason):
    with pytest.raises(ConfigError, match=reason):
        merged_weights(policy_of(kind, options))


@pytest.mark.parametrize("name", ["LoRA", "4-bit base", "one parameter", "experts", "other experts"])
def test_a_trial_changes_every_kind_of_layer_visibly_and_gives_it_back(tmp_path, name):
    if name == "4-bit base":
        policy = add_lora(load_model(save_tiny(tmp_path / "m"), quantization="nf4"), r=2, alpha=4, seed=0)
    else:
        policy = policy_of(*WRAPPERS[name])
    before = logits(policy)
    with perturbed(policy):
        moved = (logits(policy) - before).abs().max()
    assert 1e-2 < moved < 100
    assert torch.equal(logits(policy), before)
