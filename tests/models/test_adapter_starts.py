"""Starts from factors of the weights, against PEFT, which changes the base; and what mixtures of experts refuse."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from falign.errors import ConfigError
from falign.models import add_lora, load_model, weights_hash
from falign.runfile import AdapterConfig
from tests.models.tiny import save_tiny

IDS = torch.tensor([[0, 40, 60, 61, 70, 80, 5, 7]])


def stepped(model, *, steps=3):
    """Plain gradient steps on a language-modeling loss."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_training_is_pefts_and_the_base_stays(tiny, start, rslora):
    base = load_model(tiny)
    before, targets = weights_hash(base), ["q_proj", "down_proj"]
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=start, use_rslora=rslora)
    theirs = get_peft_model(copy.deepcopy(base), config)
    ours = add_lora(base, r=4, alpha=6, seed=0, target_modules=targets, start=start, rslora=rslora)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, expected)  # exactly the base at first
    moved = stepped(ours)
    torch.testing.assert_close(moved, stepped(theirs), rtol=0, atol=1e-4)
    assert (moved - expected).abs().max() > 1e-1
    assert weights_hash(ours) == before


def test_a_rank_above_that_of_a_weight_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"r=40 with init_lora_weights='pissa'.* at most 32 such factors"):
        add_lora(load_model(tiny), r=40, alpha=8, seed=0, start="pissa")


def test_experts_are_named_by_their_parameters_and_routers_are_left_alone(tmp_path):
    folder = save_tiny(tmp_path / "moe", "qwen3_moe")
    with pytest.raises(ConfigError, match=r"'experts.down_porj' is not .*Did you mean 'experts.down_proj'"):
        add_lora(load_model(folder), r=2, alpha=4, seed=0, target_parameters=["experts.down_porj"])
    with pytest.raises(ConfigError, match=r"'gate.weight' is not the parameter of experts.*router is not trained"):
        add_lora(load_model(folder), r=2, alpha=4, seed=0, target_parameters=["gate.weight"])
    adapted = add_lora(load_model(folder), r=2, alpha=4, seed=0)
    assert not any(".gate." in name for name, each in adapted.named_parameters() if each.requires_grad)


def test_names_that_match_nothing_or_too_much_are_refused(tiny):
    with pytest.raises(ConfigError, match=r"rank_pattern: 'q_porj' matches no layer.*Did you mean 'q_proj'"):
        add_lora(load_model(tiny), r=2, alpha=4, seed=0, rank_pattern={"q_porj": 3})
    with pytest.raises(ConfigError, match=r"'norm' would also train model\.layers\.0\.input_layernorm"):
        add_lora(load_model(tiny), r=2, alpha=4, seed=0, modules_to_save=["norm"])
    with pytest.raises(ConfigError, match=r"both have .*q_proj: a module is trained as a whole or has an adapter"):
        add_lora(load_model(tiny), r=2, alpha=4, seed=0, target_modules=["q_proj"], modules_to_save=["q_proj"])


@pytest.mark.parametrize(
    ("section", "new_tokens", "field"),
    [
        ({"use_dora": True}, False, "adapter.use_dora"),
        ({"init_lora_weights": "olora"}, False, "adapter.init_lora_weights=olora"),
        ({}, True, "model.new_tokens"),
    ],
)
def test_kinds_that_were_not_tried_with_sharded_weights_are_refused(section, new_tokens, field):
    AdapterConfig().check_sharding(new_tokens=False)
    with pytest.raises(ConfigError, match=f"{field} under FSDP2 has not been tried"):
        AdapterConfig(**section).check_sharding(new_tokens=new_tokens)
